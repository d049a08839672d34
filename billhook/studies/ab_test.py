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
from pathlib import Path
from typing import Any

from billhook.core import significance, statistics
from billhook.core.errors import UnknownName
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.specs import AbTestSpec, ServerSpec
from billhook.data.prompts import Prompt, read_prompts
from billhook.runs.store import STORE
from billhook.studies.endpoint import Endpoint, RequestFailed, RequestOptions, connect
from billhook.studies.openai_client import (
    Completion,
    choose_model,
    complete,
    endpoint_choice_logprobs,
    prompt_logprobs_support,
    warm_up,
)
from billhook.studies.run_study import begin_run

SIDES = ("a", "b")
ChoiceSums = list[float] | RequestFailed  # log-probabilities of the choices of an item, or why there are none


@dataclass(frozen=True)
class Transcript:
    """What both endpoints answered, [prompt][side]. `order[i]`: the side that was asked first.

    `logprobs_support`: of a task, how each offers log-probabilities, or why not; `choice_logprobs`: those of every item, if both offer them.
    """

    ends: list[Endpoint]
    order: list[int]
    answers: list[list[Completion]]
    logprobs_support: list[int | str]
    choice_logprobs: list[list[ChoiceSums]]


def run_ab_test(
    a: Endpoint,
    b: Endpoint,
    prompts: Sequence[Prompt],
    options: RequestOptions | None = None,
    watch: EventListener = ignore_events,
) -> dict[str, Any]:
    """Ask both endpoints every prompt; times, errors, agreement and scores, paired, and every prompt's outcome.

    It ends within `at_most_seconds` of the result, whatever the servers do. Raises EndpointError before any prompt is
    asked if one of them cannot be reached or refuses what it is asked.
    """
    options = options if options is not None else RequestOptions()
    start = time.perf_counter()
    heard = asyncio.run(_collect_answers((a, b), prompts, options, watch))
    return _ab_result(heard, prompts, options) | {"seconds": round(time.perf_counter() - start, 3)}


def request_options(options: Mapping[str, Any]) -> RequestOptions:
    """`Asking` from its fields by name. Raises UnknownName for any other."""
    known = [each.name for each in fields(RequestOptions)]
    for name in options:
        if name not in known:
            raise UnknownName("way of asking", name, known)
    return RequestOptions(**options)


def run_spec(a: Endpoint, b: Endpoint, prompts: str, limit: int | None, options: RequestOptions) -> AbTestSpec:
    """What a run of the store was asked."""
    return AbTestSpec(f"{a.url} {b.url}", _server(a), _server(b), prompts, limit, asdict(options))


def _server(end: Endpoint) -> ServerSpec:
    return ServerSpec(end.url, end.model, end.key_env)


# -- asking ---------------------------------------------------------------------------------------------------------


async def _collect_answers(
    ends: Sequence[Endpoint], prompts: Sequence[Prompt], options: RequestOptions, watch: EventListener
) -> Transcript:
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(connect(end, options)) for end in ends]
        lines = [await choose_model(line) for line in lines]  # both, before either is asked anything
        lines = [await warm_up(line) for line in lines]
        order = [number % 2 for number in range(len(prompts))]
        random.Random(options.seed).shuffle(order)

        async def ask(number: int, side: int) -> Completion:
            return await complete(lines[side], prompts[number].text, prompts[number].messages)

        answers = await _in_pairs("ask", ask, order, options.concurrency, watch)
        can = (
            [await prompt_logprobs_support(line, prompts[0].choices[0]) for line in lines] if prompts[0].choices else []
        )
        news = [new_tokens for new_tokens in can if isinstance(new_tokens, int)]

        async def score(number: int, side: int) -> ChoiceSums:
            return await endpoint_choice_logprobs(lines[side], prompts[number].choices, news[side])

        both = len(news) == 2
        sums = await _in_pairs("score", score, order, options.concurrency, watch) if both else []
        return Transcript([line.endpoint for line in lines], order, answers, can, sums)


async def _in_pairs(
    stage: str, ask: Callable[[int, int], Awaitable[Any]], order: Sequence[int], concurrency: int, watch: EventListener
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


def _at_most_s(prompts: Sequence[Prompt], options: RequestOptions) -> float:
    """Seconds until the end at most: every answer takes all of its time, and the longest pair comes last."""
    texts = [2 * 2 * len(prompt.choices) for prompt in prompts]  # at most a context for every choice, of both sides
    pairs = (2 * len(prompts) + sum(texts)) / options.concurrency + 2 + max(texts)
    first = 2 + 2 * 2 + 2 * 2  # models, warm-up, whether there are log-probabilities
    return (first + pairs) * options.longest_s


# -- telling --------------------------------------------------------------------------------------------------------


def _ab_result(transcript: Transcript, prompts: Sequence[Prompt], options: RequestOptions) -> dict[str, Any]:
    """The result: each side, B against A, and every outcome. Plain values that survive JSON."""
    both = [pair for pair in transcript.answers if pair[0].error is None and pair[1].error is None]
    by_server = bool(both) and all(each.tokens is not None for pair in both for each in pair)
    times: dict[str, list[list[float | None]]] = {
        "latency_s": [[each.seconds for each in pair] for pair in both],
        "total_s": [[each.total_s for each in pair] for pair in both],
        "first_token_s": [[each.first_s for each in pair] for pair in both],
        "tokens_per_s": [[_rate(each, by_server) for each in pair] for pair in both],
    }
    rows = {name: _paired_row(pairs, options.seed) for name, pairs in times.items()}
    sides = [_side(end, [pair[side] for pair in transcript.answers]) for side, end in enumerate(transcript.ends)]
    return {
        "a": sides[0] | {name: row["a"] for name, row in rows.items()},
        "b": sides[1] | {name: row["b"] for name, row in rows.items()},
        "ratio": {name: row["ratio"] for name, row in rows.items()},
        "pairs": len(both),
        "tokens_counted_by": "server" if by_server else "pieces",
        "answered": _answered(transcript.answers),
        "agreement": _agreement(both, options.seed) if both else None,
        "task": _task(transcript, prompts, options.seed) if transcript.logprobs_support else None,
        "asking": asdict(options),
        "at_most_seconds": _at_most_s(prompts, options),
        "outcomes": [_outcome(transcript, number, prompt) for number, prompt in enumerate(prompts)],
    }


def _rate(completion: Completion, by_server: bool) -> float | None:
    """Tokens a second of a whole answer; None for an empty one."""
    count = completion.tokens if by_server else completion.pieces
    return count / completion.seconds if count and completion.seconds else None


def _paired_row(pairs: Sequence[Sequence[float | None]], seed: int) -> dict[str, Any]:
    """Mean of A, mean of B and the ratio of both, over the pairs in which both are known."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not known:
        return {"a": None, "b": None, "ratio": None}
    a, b = zip(*known, strict=True)
    return {"a": _mean(a, seed), "b": _mean(b, seed), "ratio": _interval_json(statistics.paired_ratio(a, b, seed))}


def _mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    return _interval_json(statistics.paired_ratio([1.0] * len(values), values, seed))


def _interval_json(interval: Estimate) -> dict[str, Any]:
    """An interval as JSON; ends that are not known are null."""
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return {"value": interval.value, "low": low, "high": high, "n": interval.n, "reliable": interval.reliable}


def _share(count: int, n: int) -> dict[str, Any]:
    low, high = statistics.wilson_interval(count, n)
    return {"value": count / n, "low": low, "high": high, "n": n, "reliable": True}


def _side(end: Endpoint, answers: Sequence[Completion]) -> dict[str, Any]:
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


def _answered(answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Which of both answered, by prompt, and McNemar's mid-p that they fail alike."""
    seen = Counter((a.error is None, b.error is None) for a, b in answers)
    only_a, only_b = seen[True, False], seen[False, True]
    return {"both": seen[True, True], "only_a": only_a, "only_b": only_b, "neither": seen[False, False],
            "p": significance.mcnemar(only_b, only_a)}  # fmt: skip


def _agreement(both: Sequence[Sequence[Completion]], seed: int) -> dict[str, Any]:
    """How often the texts are the same, and how much of their beginnings is, on average."""
    texts = [(a.text or "", b.text or "") for a, b in both]
    return {
        "same": _share(sum(a == b for a, b in texts), len(texts)),
        "prefix_words": _mean([_prefix(a.split(), b.split()) for a, b in texts], seed),
        "prefix_characters": _mean([_prefix(a, b) for a, b in texts], seed),
    }


def _prefix(a: Sequence[str], b: Sequence[str]) -> float:
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _task(transcript: Transcript, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """Accuracy by log-probabilities over the items that both scored, and its change, paired; or why there is none."""
    why = {name: can for name, can in zip(SIDES, transcript.logprobs_support, strict=True) if isinstance(can, str)}
    told: dict[str, Any] = {"not_offered": why, "items": 0, "acc": None, "acc_norm": None}
    scored = [
        (prompt, pair[0], pair[1])
        for prompt, pair in zip(prompts, transcript.choice_logprobs, strict=False)
        if not isinstance(pair[0], RequestFailed) and not isinstance(pair[1], RequestFailed)
    ]
    told["errors"] = {
        name: sum(isinstance(pair[side], RequestFailed) for pair in transcript.choice_logprobs)
        for side, name in enumerate(SIDES)
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
        told[name]["change"] = _interval_json(statistics.paired_difference(a, b, seed))
    return told


def _choice(sums: Sequence[float], prompt: Prompt, name: str) -> int:
    """The likeliest choice, the first of equal ones; for `acc_norm` by character, as `billhook.methods.evaluate` has it."""
    sizes = [request.characters if name == "acc_norm" else 1 for request in prompt.choices]
    return max(range(len(sums)), key=lambda i: sums[i] / sizes[i])


def _outcome(transcript: Transcript, number: int, prompt: Prompt) -> dict[str, Any]:
    a, b = transcript.answers[number]
    told = {
        "prompt": prompt.number,
        "first": SIDES[transcript.order[number]],
        "a": asdict(a),
        "b": asdict(b),
        "same": a.text == b.text if a.error is None and b.error is None else None,
    }
    if transcript.choice_logprobs:
        told["scores"] = {
            name: str(sums) if isinstance(sums, RequestFailed) else sums
            for name, sums in zip(SIDES, transcript.choice_logprobs[number], strict=True)
        } | {"gold": prompt.gold}
    return told


def ab_test(
    a: str, b: str, prompts: str | Path, *, model_a: str = "", model_b: str = "", api_key_env_a: str = "",
    api_key_env_b: str = "", limit: int | None = None, store: str | Path = STORE, watch: EventListener = ignore_events, **asking: Any,
) -> dict[str, Any]:  # fmt: skip
    """Two OpenAI-compatible servers on the prompts of a file: times, errors, agreement, and task scores, in pairs.

    `prompts`: a .txt, a .jsonl with `prompt` or `messages`, or a task's items; `limit` of them. `asking`: fields of
    `Asking`, such as `timeout`. The result, with every answer, is filed in `store`.
    """
    how = request_options(asking)
    ends = Endpoint.create("A", a, model_a, api_key_env_a), Endpoint.create("B", b, model_b, api_key_env_b)
    found = read_prompts(prompts, how.kind, limit, how.seed)
    with begin_run(run_spec(*ends, str(prompts), limit, how), "cpu", Path(store), "") as (opened, run):
        told = {"run": run, "prompts": str(prompts)} | run_ab_test(*ends, found, how, watch)
        opened.update(run, result=told)
        return told
