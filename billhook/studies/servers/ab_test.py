"""Two endpoints against each other: the same prompts, asked in pairs, and every difference with its interval.

A pair is asked one after the other, A first in half of the pairs, so that a drifting machine hits both alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Unpack

from billhook.core import significance, statistics
from billhook.core.errors import UnknownName
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.options import RequestFields, shows_options
from billhook.core.results.ab_report import (
    AbReport,
    AbTask,
    Answered,
    Completion,
    EndpointReport,
    ItemScores,
    Measure,
    PairedAccuracy,
    PairedMeasure,
    PromptOutcome,
    RequestOptions,
    TextAgreement,
)
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.specs import AbTestSpec, ServerSpec
from billhook.data.prompts import Prompt, read_prompts
from billhook.runs.job import store_and_watch
from billhook.runs.store import STORE
from billhook.studies.run_study import begin_run
from billhook.studies.servers.endpoint import Endpoint, RequestFailed, connect
from billhook.studies.servers.openai_client import (
    choose_model,
    complete,
    endpoint_choice_logprobs,
    prompt_logprobs_support,
    warm_up,
)

SIDES: tuple[Literal["a", "b"], ...] = ("a", "b")
ChoiceSums = list[float] | RequestFailed  # log-probabilities of the choices of an item, or why there are none


@dataclass(frozen=True)
class Transcript:
    """What both endpoints answered, [prompt][side]. `order[i]`: the side that was asked first.

    `logprobs_support`: of a task, how each offers log-probabilities, or why not; `choice_logprobs`: those of every
    item, if both offer them.
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
) -> AbReport:
    """Ask both endpoints every prompt; times, errors, agreement and scores, paired, and every prompt's outcome.

    It ends within `at_most_seconds` of the result, whatever the servers do. Raises EndpointError before any prompt is
    asked if one of them cannot be reached or refuses what it is asked.
    """
    options = options if options is not None else RequestOptions()
    start = time.perf_counter()
    transcript = asyncio.run(_collect_answers((a, b), prompts, options, watch))
    return _ab_report(transcript, prompts, options, round(time.perf_counter() - start, 3))


def request_options(options: Mapping[str, Any]) -> RequestOptions:
    """`RequestOptions` from its fields by name. Raises UnknownName for any other."""
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
    answers: list[list[Any]] = [[None, None] for _ in order]
    gate, done = asyncio.Semaphore(concurrency), 0

    async def pair(number: int) -> None:
        nonlocal done
        async with gate:
            for side in (order[number], 1 - order[number]):
                answers[number][side] = await ask(number, side)
        done += 1
        watch(Event(stage, done, len(order)))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(len(order)):
                group.create_task(pair(number))
    except BaseExceptionGroup as several:  # of the watcher; what a server does is a value
        raise several.exceptions[0] from None
    return answers


def _at_most_s(prompts: Sequence[Prompt], options: RequestOptions) -> float:
    """Seconds until the end at most: every answer takes all of its time, and the longest pair comes last."""
    texts = [2 * 2 * len(prompt.choices) for prompt in prompts]  # at most a context for every choice, of both sides
    pairs = (2 * len(prompts) + sum(texts)) / options.concurrency + 2 + max(texts)
    first = 2 + 2 * 2 + 2 * 2  # models, warm-up, whether there are log-probabilities
    return (first + pairs) * options.longest_s


# -- reporting ------------------------------------------------------------------------------------------------------


def _ab_report(transcript: Transcript, prompts: Sequence[Prompt], options: RequestOptions, seconds: float) -> AbReport:
    """Each side, B against A, and every outcome."""
    both = [pair for pair in transcript.answers if pair[0].error is None and pair[1].error is None]
    by_server = bool(both) and all(each.tokens is not None for pair in both for each in pair)
    times: dict[Measure, list[list[float | None]]] = {
        "latency_s": [[each.seconds for each in pair] for pair in both],
        "total_s": [[each.total_s for each in pair] for pair in both],
        "first_token_s": [[each.first_s for each in pair] for pair in both],
        "tokens_per_s": [[_rate(each, by_server) for each in pair] for pair in both],
    }
    measured = (_paired_measure(name, pairs, options.seed) for name, pairs in times.items())
    a, b = (_side(end, [pair[side] for pair in transcript.answers]) for side, end in enumerate(transcript.ends))
    return AbReport(
        a=a,
        b=b,
        measures=tuple(each for each in measured if each is not None),
        pairs=len(both),
        tokens_counted_by="server" if by_server else "pieces",
        answered=_answered(transcript.answers),
        agreement=_agreement(both, options.seed) if both else None,
        task=_task(transcript, prompts, options.seed) if transcript.logprobs_support else None,
        asking=options,
        at_most_seconds=_at_most_s(prompts, options),
        seconds=seconds,
        outcomes=tuple(_outcome(transcript, number, prompt) for number, prompt in enumerate(prompts)),
    )


def _rate(completion: Completion, by_server: bool) -> float | None:
    """Tokens a second of a whole answer; None for an empty one."""
    count = completion.tokens if by_server else completion.pieces
    return count / completion.seconds if count and completion.seconds else None


def _paired_measure(name: Measure, pairs: Sequence[Sequence[float | None]], seed: int) -> PairedMeasure | None:
    """Mean of A, mean of B and the ratio of both, over the pairs in which both are known; None if none is."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not known:
        return None
    a, b = zip(*known, strict=True)
    return PairedMeasure(name, _mean(a, seed), _mean(b, seed), statistics.paired_ratio(a, b, seed))


def _mean(values: Sequence[float], seed: int) -> Estimate:
    return statistics.paired_ratio([1.0] * len(values), values, seed)


def _share(count: int, n: int) -> Estimate:
    return Estimate(count / n, *statistics.wilson_interval(count, n), n, n, reliable=True)


def _side(end: Endpoint, answers: Sequence[Completion]) -> EndpointReport:
    good = [each for each in answers if each.error is None]
    return EndpointReport(
        url=end.url,
        model=end.model,
        answered=_share(len(good), len(answers)),
        errors=dict(sorted(Counter(each.error for each in answers if each.error).items())),
        first_errors={each.error: each.detail for each in reversed(answers) if each.error},
        retries=sum(each.attempts - 1 for each in answers),
        tokens=sum(each.tokens or 0 for each in good) if all(each.tokens is not None for each in good) else None,
    )


def _answered(answers: Sequence[Sequence[Completion]]) -> Answered:
    seen = Counter((a.error is None, b.error is None) for a, b in answers)
    only_a, only_b = seen[True, False], seen[False, True]
    return Answered(seen[True, True], only_a, only_b, seen[False, False], significance.mcnemar(only_b, only_a))


def _agreement(both: Sequence[Sequence[Completion]], seed: int) -> TextAgreement:
    """How often the texts are the same, and how much of their beginnings is, on average."""
    texts = [(a.text or "", b.text or "") for a, b in both]
    return TextAgreement(
        _share(sum(a == b for a, b in texts), len(texts)),
        _mean([_prefix(a.split(), b.split()) for a, b in texts], seed),
        _mean([_prefix(a, b) for a, b in texts], seed),
    )


def _prefix(a: Sequence[str], b: Sequence[str]) -> float:
    return float(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _task(transcript: Transcript, prompts: Sequence[Prompt], seed: int) -> AbTask:
    """Accuracy by log-probabilities over the items that both scored, and its change, paired; or why there is none."""
    why: dict[str, str] = {
        name: can for name, can in zip(SIDES, transcript.logprobs_support, strict=True) if isinstance(can, str)
    }
    scored = [
        (prompt, pair[0], pair[1])
        for prompt, pair in zip(prompts, transcript.choice_logprobs, strict=False)
        if not isinstance(pair[0], RequestFailed) and not isinstance(pair[1], RequestFailed)
    ]
    errors: dict[str, int] = {
        name: sum(isinstance(pair[side], RequestFailed) for pair in transcript.choice_logprobs)
        for side, name in enumerate(SIDES)
    }
    acc, acc_norm = (_accuracy(name, scored, seed) if scored else None for name in ("acc", "acc_norm"))
    return AbTask(why, len(scored), errors, acc, acc_norm)


def _accuracy(name: str, scored: Sequence[tuple[Prompt, list[float], list[float]]], seed: int) -> PairedAccuracy:
    right = [
        tuple(float(_choice(sums[side], prompt, name) == prompt.gold) for prompt, *sums in scored) for side in (0, 1)
    ]
    n = len(scored)
    a, b = (EvalResult(name, "", each, (1,) * n, tuple(range(n))) for each in right)
    change = statistics.paired_difference(a, b, seed)
    return PairedAccuracy(_share(int(sum(a.sums)), n), _share(int(sum(b.sums)), n), change)


def _choice(sums: Sequence[float], prompt: Prompt, name: str) -> int:
    """The likeliest choice, the first of equal ones; for `acc_norm` by character, as the evaluation of that name."""
    sizes = [request.characters if name == "acc_norm" else 1 for request in prompt.choices]
    return max(range(len(sums)), key=lambda i: sums[i] / sizes[i])


def _outcome(transcript: Transcript, number: int, prompt: Prompt) -> PromptOutcome:
    a, b = transcript.answers[number]
    same = a.text == b.text if a.error is None and b.error is None else None
    first = SIDES[transcript.order[number]]
    if not transcript.choice_logprobs:
        return PromptOutcome(prompt.number, first, a, b, same)
    scores = [
        ItemScores(error=str(sums)) if isinstance(sums, RequestFailed) else ItemScores(tuple(sums))
        for sums in transcript.choice_logprobs[number]
    ]
    return PromptOutcome(prompt.number, first, a, b, same, scores[0], scores[1], prompt.gold)


REQUEST_FIELDS = {each.name: each for each in fields(RequestOptions)}


@shows_options(RequestFields, REQUEST_FIELDS)
def ab_test(
    a: str, b: str, prompts: str | Path, *, model_a: str = "", model_b: str = "", api_key_env_a: str = "",
    api_key_env_b: str = "", limit: int | None = None, store: str | Path = STORE, watch: EventListener = ignore_events,
    **asking: Unpack[RequestFields],
) -> AbReport:  # fmt: skip
    """Two OpenAI-compatible servers on the prompts of a file: times, errors, agreement, and task scores, in pairs.

    `prompts`: a .txt, a .jsonl with `prompt` or `messages`, or a task's items; `limit` of them. `asking`: fields of
    `RequestOptions`, such as `timeout`. The result, with every answer, is stored in `store`.
    """
    how = request_options(asking)
    ends = Endpoint.create("A", a, model_a, api_key_env_a), Endpoint.create("B", b, model_b, api_key_env_b)
    drawn = read_prompts(prompts, how.kind, limit, how.seed)
    with begin_run(run_spec(*ends, str(prompts), limit, how), "cpu", Path(store), "") as (opened, run):
        listen = store_and_watch(opened, run, watch)
        report = replace(run_ab_test(*ends, drawn, how, listen), run=run, prompts=str(prompts))
        opened.update(run, result=report.to_json())
        return report
