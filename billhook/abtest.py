"""Two endpoints against each other: the same prompts, asked in pairs, and every difference with its interval.

A pair is asked one after the other, A first in half of the pairs, so that a drifting machine hits both alike.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from billhook import stats, verdict
from billhook.answering import Answer, answer, likelihoods, offered, reach, warm
from billhook.endpoint import Asking, Endpoint, Failure, opened
from billhook.errors import UnknownName
from billhook.records import EvalResult, Event, Interval, Watch, silent

if TYPE_CHECKING:
    from billhook.prompts import Prompt

SIDES = ("a", "b")
Sums = list[float] | Failure  # log-probabilities of the choices of an item, or why there are none


@dataclass(frozen=True)
class Heard:
    """What both endpoints answered, [prompt][side]. `order[i]`: the side that was asked first.

    `can`: of a task, how each offers log-probabilities, or why not; `sums`: those of every item, if both offer them.
    """

    ends: list[Endpoint]
    order: list[int]
    answers: list[list[Answer]]
    can: list[int | str]
    sums: list[list[Sums]]


def abtest(
    a: Endpoint, b: Endpoint, prompts: Sequence[Prompt], asking: Asking | None = None, watch: Watch = silent
) -> dict[str, Any]:
    """Ask both endpoints every prompt; times, errors, agreement and scores, paired, and every prompt's outcome.

    It ends within `at_most_seconds` of the result, whatever the servers do. Raises EndpointError before any prompt is
    asked if one of them cannot be reached or refuses what it is asked.
    """
    asking = asking if asking is not None else Asking()
    start = time.perf_counter()
    heard = asyncio.run(_hear((a, b), prompts, asking, watch))
    return _told(heard, prompts, asking) | {"seconds": round(time.perf_counter() - start, 3)}


def asking_of(options: Mapping[str, Any]) -> Asking:
    """`Asking` from its fields by name. Raises UnknownName for any other."""
    known = [each.name for each in fields(Asking)]
    for name in options:
        if name not in known:
            raise UnknownName("way of asking", name, known)
    return Asking(**options)


def recipe_of(a: Endpoint, b: Endpoint, prompts: str, limit: int | None, asking: Asking) -> dict[str, Any]:
    """What a run of the store was told."""
    what = {"model": f"{a.url} {b.url}", "remove": None, "plan": None, "prompts": prompts, "limit": limit}
    return what | {"a": asdict(a), "b": asdict(b), "asking": asdict(asking)}


# -- asking ---------------------------------------------------------------------------------------------------------


async def _hear(ends: Sequence[Endpoint], prompts: Sequence[Prompt], asking: Asking, watch: Watch) -> Heard:
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(opened(end, asking)) for end in ends]
        lines = [await reach(line) for line in lines]  # both, before either is asked anything
        lines = [await warm(line) for line in lines]
        order = [number % 2 for number in range(len(prompts))]
        random.Random(asking.seed).shuffle(order)

        async def ask(number: int, side: int) -> Answer:
            return await answer(lines[side], prompts[number].text, prompts[number].messages)

        answers = await _in_pairs("ask", ask, order, asking.concurrency, watch)
        can = [await offered(line, prompts[0].choices[0]) for line in lines] if prompts[0].choices else []
        news = [new_tokens for new_tokens in can if isinstance(new_tokens, int)]

        async def score(number: int, side: int) -> Sums:
            return await likelihoods(lines[side], prompts[number].choices, news[side])

        both = len(news) == 2
        sums = await _in_pairs("score", score, order, asking.concurrency, watch) if both else []
        return Heard([line.end for line in lines], order, answers, can, sums)


async def _in_pairs(
    stage: str, ask: Callable[[int, int], Awaitable[Any]], order: Sequence[int], concurrency: int, watch: Watch
) -> list[list[Any]]:
    """What `ask(number, side)` gives of every prompt, both sides in turn, `concurrency` pairs at a time."""
    found: list[list[Any]] = [[None, None] for _ in order]
    gate, done = asyncio.Semaphore(concurrency), 0

    async def pair(number: int) -> None:
        nonlocal done
        async with gate:
            for side in (order[number], 1 - order[number]):
                found[number][side] = await ask(number, side)
        done += 1
        watch(Event(stage, done, len(order)))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(len(order)):
                group.create_task(pair(number))
    except BaseExceptionGroup as several:  # of the watcher; what a server does is a value
        raise several.exceptions[0] from None
    return found


def _at_most_s(prompts: Sequence[Prompt], asking: Asking) -> float:
    """Seconds until the end at most: every answer takes all of its time, and the longest pair comes last."""
    texts = [2 * 2 * len(prompt.choices) for prompt in prompts]  # at most a context for every choice, of both sides
    pairs = (2 * len(prompts) + sum(texts)) / asking.concurrency + 2 + max(texts)
    first = 2 + 2 * 2 + 2 * 2  # models, warm-up, whether there are log-probabilities
    return (first + pairs) * asking.at_most_s


# -- telling --------------------------------------------------------------------------------------------------------


def _told(heard: Heard, prompts: Sequence[Prompt], asking: Asking) -> dict[str, Any]:
    """The result: each side, B against A, and every outcome. Plain values that survive JSON."""
    both = [pair for pair in heard.answers if pair[0].error is None and pair[1].error is None]
    by_server = bool(both) and all(each.tokens is not None for pair in both for each in pair)
    times: dict[str, list[list[float | None]]] = {
        "latency_s": [[each.seconds for each in pair] for pair in both],
        "total_s": [[each.total_s for each in pair] for pair in both],
        "first_token_s": [[each.first_s for each in pair] for pair in both],
        "tokens_per_s": [[_rate(each, by_server) for each in pair] for pair in both],
    }
    rows = {name: _row(pairs, asking.seed) for name, pairs in times.items()}
    sides = [_side(end, [pair[side] for pair in heard.answers]) for side, end in enumerate(heard.ends)]
    return {
        "laboratory": "abtest",
        "a": sides[0] | {name: row["a"] for name, row in rows.items()},
        "b": sides[1] | {name: row["b"] for name, row in rows.items()},
        "ratio": {name: row["ratio"] for name, row in rows.items()},
        "pairs": len(both),
        "tokens_counted_by": "server" if by_server else "pieces",
        "answered": _answered(heard.answers),
        "agreement": _agreement(both, asking.seed) if both else None,
        "task": _task(heard, prompts, asking.seed) if heard.can else None,
        "asking": asdict(asking),
        "at_most_seconds": _at_most_s(prompts, asking),
        "outcomes": [_outcome(heard, number, prompt) for number, prompt in enumerate(prompts)],
    }


def _rate(told: Answer, by_server: bool) -> float | None:
    """Tokens a second of a whole answer; None for an empty one."""
    count = told.tokens if by_server else told.pieces
    return count / told.seconds if count and told.seconds else None


def _row(pairs: Sequence[Sequence[float | None]], seed: int) -> dict[str, Any]:
    """Mean of A, mean of B and the ratio of both, over the pairs in which both are known."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not known:
        return {"a": None, "b": None, "ratio": None}
    a, b = zip(*known, strict=True)
    return {"a": _mean(a, seed), "b": _mean(b, seed), "ratio": _plain(stats.paired_ratio(a, b, seed))}


def _mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    return _plain(stats.paired_ratio([1.0] * len(values), values, seed))


def _plain(told: Interval) -> dict[str, Any]:
    """An interval as JSON; ends that are not known are null."""
    low, high = (end if math.isfinite(end) else None for end in (told.low, told.high))
    return {"value": told.value, "low": low, "high": high, "n": told.n, "reliable": told.reliable}


def _share(count: int, n: int) -> dict[str, Any]:
    low, high = stats.share_interval(count, n)
    return {"value": count / n, "low": low, "high": high, "n": n, "reliable": True}


def _side(end: Endpoint, answers: Sequence[Answer]) -> dict[str, Any]:
    good = [each for each in answers if each.error is None]
    return {
        "url": end.url,
        "model": end.model,
        "answered": _share(len(good), len(answers)),
        "errors": dict(sorted(Counter(each.error for each in answers if each.error).items())),
        "first_errors": {each.error: each.detail for each in reversed(answers) if each.error},
        "retries": sum(each.attempts - 1 for each in answers),
        "tokens": sum(each.tokens or 0 for each in good) if all(each.tokens is not None for each in good) else None,
    }


def _answered(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Which of both answered, by prompt, and McNemar's mid-p that they fail alike."""
    seen = Counter((a.error is None, b.error is None) for a, b in answers)
    only_a, only_b = seen[True, False], seen[False, True]
    return {"both": seen[True, True], "only_a": only_a, "only_b": only_b, "neither": seen[False, False],
            "p": verdict.mcnemar(only_b, only_a)}  # fmt: skip


def _agreement(both: Sequence[Sequence[Answer]], seed: int) -> dict[str, Any]:
    """How often the texts are the same, and how much of their beginnings is, on average."""
    texts = [(a.text or "", b.text or "") for a, b in both]
    return {
        "same": _share(sum(a == b for a, b in texts), len(texts)),
        "prefix_words": _mean([_prefix(a.split(), b.split()) for a, b in texts], seed),
        "prefix_characters": _mean([_prefix(a, b) for a, b in texts], seed),
    }


def _prefix(a: Sequence[str], b: Sequence[str]) -> float:
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _task(heard: Heard, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """Accuracy by log-probabilities over the items that both scored, and its change, paired; or why there is none."""
    why = {name: can for name, can in zip(SIDES, heard.can, strict=True) if isinstance(can, str)}
    told: dict[str, Any] = {"not_offered": why, "items": 0, "acc": None, "acc_norm": None}
    scored = [
        (prompt, pair[0], pair[1])
        for prompt, pair in zip(prompts, heard.sums, strict=False)
        if not isinstance(pair[0], Failure) and not isinstance(pair[1], Failure)
    ]
    told["errors"] = {
        name: sum(isinstance(pair[side], Failure) for pair in heard.sums) for side, name in enumerate(SIDES)
    }
    told["items"] = n = len(scored)
    for name in ("acc", "acc_norm") if scored else ():
        right = [
            tuple(
                float(_choice(sums, prompt, name) == prompt.gold) for prompt, *both in scored for sums in [both[side]]
            )
            for side in (0, 1)
        ]
        a, b = (EvalResult(name, "", each, (1,) * n, tuple(range(n))) for each in right)
        told[name] = {"a": _share(int(sum(a.sums)), n), "b": _share(int(sum(b.sums)), n)}
        told[name]["change"] = _plain(stats.paired_difference(a, b, seed))
    return told


def _choice(sums: Sequence[float], prompt: Prompt, name: str) -> int:
    """The likeliest choice, the first of equal ones; for `acc_norm` by character, as `billhook.evaluate` has it."""
    sizes = [request.characters if name == "acc_norm" else 1 for request in prompt.choices]
    return max(range(len(sums)), key=lambda i: sums[i] / sizes[i])


def _outcome(heard: Heard, number: int, prompt: Prompt) -> dict[str, Any]:
    a, b = heard.answers[number]
    told = {
        "prompt": prompt.number,
        "first": SIDES[heard.order[number]],
        "a": asdict(a),
        "b": asdict(b),
        "same": a.text == b.text if a.error is None and b.error is None else None,
    }
    if heard.sums:
        told["scores"] = {
            name: str(sums) if isinstance(sums, Failure) else sums
            for name, sums in zip(SIDES, heard.sums[number], strict=True)
        } | {"gold": prompt.gold}
    return told
