"""One round of a watch: what a server, or a folder, gets on the items of a baseline, and how fast and how often."""

from __future__ import annotations

import asyncio
import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from billhook.core.errors import EndpointError, FingerprintError
from billhook.core.events import Event, EventListener
from billhook.core.monitoring.alerts import Observation
from billhook.core.monitoring.observations import percent_lost
from billhook.core.monitoring.sequential import (
    Bounds,
    evidence_needed,
    item_losses,
    loss_bounds,
    mean_bounds,
    median_bounds,
    nats_bounds,
)
from billhook.core.results.ab_report import Completion, RequestOptions
from billhook.core.results.comparisons import Baseline
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.monitoring import AnsweredProbe, WatchRound
from billhook.core.statistics import FEW_CLUSTERS, LOSS_EVALUATIONS
from billhook.data.choice_tasks import Request, requests, select_items
from billhook.data.generation_tasks import is_generation_task, select_questions
from billhook.methods.evaluate.generation import flexible_number, plain_number, strict_number, truncate_at_stop
from billhook.runs.job import EvalContext
from billhook.studies.eval_sets import ComparisonSpec, evaluate_on_sets
from billhook.studies.gate import cached_results
from billhook.studies.monitoring.lineage import caused_by
from billhook.studies.servers.endpoint import Connection, Endpoint, RequestFailed, connect
from billhook.studies.servers.openai_client import (
    choose_model,
    complete,
    endpoint_choice_logprobs,
    prompt_logprobs_support,
    warm_up,
)

T = TypeVar("T")
R = TypeVar("R")
ANSWER_TOKENS = 256  # of a task that is answered in writing
SINGLE_SERIES = 5  # beside the tasks: latency and throughput, absolute and by the first round, and errors


@dataclass(frozen=True)
class WatchItem:
    """One item of a task: scored `choices` and which is right, or a `prompt` with the right answer."""

    prompt: str
    choices: tuple[Request, ...] = ()
    gold: int = 0
    target: str = ""


@dataclass(frozen=True)
class WatchTask:
    """A task of a baseline: its items, the score, and what the baseline got on each."""

    source: str
    score: str
    items: tuple[WatchItem, ...]
    baseline: EvalResult

    @property
    def digest(self) -> str:
        """A digest of all that is asked."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()[:16]


def read_task_items(baseline: Baseline, source: str, score: str, result: EvalResult) -> WatchTask:
    """Return the items of a task in the order in which a baseline was measured on them; no tokenizer is needed.

    Raises FingerprintError if the file has other items now.
    """
    own = baseline.items
    given = (own.shots_from or source, own.shots) if own.shots else None
    if is_generation_task(source):
        questions, texts, before = select_questions(source, limit_items=own.items, seed=own.seed, shots=given)
        items = tuple(WatchItem(before + question.query, target=question.target) for question in questions)
    else:
        chosen, texts, solved = select_items(source, part="evaluation", seed=own.seed, shots=given)
        chosen, texts = chosen[: own.items], texts[: own.items]
        asked = [(tuple(requests(item, solved.get(item.subject, ""))), item.gold) for item in chosen]
        items = tuple(WatchItem(choices[0].context, choices, gold) for choices, gold in asked)
    if tuple(texts) != result.clusters:
        raise FingerprintError(
            f"{source} has other items than the baseline {baseline.name} was measured on: the file has changed. Save "
            "a new baseline."
        )
    return WatchTask(source, score, items, result)


# -- a server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointRounds:
    """How a server is asked each round. `probes`: prompts that are asked for their time."""

    endpoint: Endpoint
    options: RequestOptions
    tasks: tuple[WatchTask, ...]
    probes: int
    watch: EventListener

    @property
    def series(self) -> str:
        """A digest of what makes two rounds comparable."""
        told = [self.endpoint.url, self.endpoint.model, self.options.kind, self.options.max_tokens, self.probes]
        tasks = [[task.source, task.score, task.digest, task.baseline.sums] for task in self.tasks]
        return hashlib.sha256(json.dumps([told, tasks]).encode()).hexdigest()[:12]

    def measure(self, number: int, first: WatchRound | None) -> WatchRound:
        """Return round `number`; `first`: the first of the series, whose times are the reference.

        A server that cannot be asked is a round of failed requests, but for the first one: raises EndpointError.
        """
        at = time.time()
        try:
            found = asyncio.run(self._ask())
        except EndpointError as error:
            if first is None:
                raise
            found = self._unreachable(error)
        return self._observed(replace(found, number=number, at=at), first)

    def _prompts(self) -> list[str]:
        return [item.prompt for task in self.tasks for item in task.items][: self.probes]

    def _unreachable(self, error: EndpointError) -> WatchRound:
        count = sum(len(task.items) for task in self.tasks) + len(self._prompts())
        outcomes = {task.source: "-" * len(task.items) for task in self.tasks}
        probes = (AnsweredProbe(None, None),) * len(self._prompts())
        told = {"unreachable": str(error)[:300]}
        return WatchRound(0, 0.0, (), outcomes, probes, count, {"unreachable": count}, told)

    async def _ask(self) -> WatchRound:
        async with connect(self.endpoint, self.options) as opened:
            line = await warm_up(await choose_model(opened))
            prompts, failed = self._prompts(), list[RequestFailed]()
            answers = await self._each("time", prompts, lambda text: complete(line, text))
            failed += [RequestFailed(a.error, a.detail) for a in answers if a.error is not None]
            outcomes = {}
            for task in self.tasks:
                marks = await self._task(line, task)
                failed += [mark for mark in marks if isinstance(mark, RequestFailed)]
                outcomes[task.source] = "".join("-" if isinstance(m, RequestFailed) else str(int(m)) for m in marks)
        requested = len(prompts) + sum(len(task.items) for task in self.tasks)
        first_errors = {each.kind: each.detail for each in reversed(failed)}
        errors = dict(sorted(Counter(each.kind for each in failed).items()))
        return WatchRound(0, 0.0, (), outcomes, tuple(map(_probe, answers)), requested, errors, first_errors)

    async def _task(self, line: Connection, task: WatchTask) -> list[bool | RequestFailed]:
        """Whether each item is answered rightly, or why it was not answered. Raises EndpointError without echo."""
        if not task.items[0].choices:
            written = replace(line, options=replace(line.options, max_tokens=ANSWER_TOKENS))

            async def answer(item: WatchItem) -> bool | RequestFailed:
                return _is_right(await complete(written, item.prompt), item.target, task.score)

            return await self._each(task.source, task.items, answer)
        support = await prompt_logprobs_support(line, task.items[0].choices[0])
        if isinstance(support, str):
            raise EndpointError(
                f"{line.endpoint.url} gives no log-probabilities of a prompt ({support}), which {task.source} needs. "
                "Serve the model by vLLM, or watch a task of questions with `target`, which is answered in writing."
            )

        async def score(item: WatchItem) -> bool | RequestFailed:
            sums = await endpoint_choice_logprobs(line, item.choices, support)
            if isinstance(sums, RequestFailed):
                return sums
            sizes = [each.characters if task.score == "acc_norm" else 1 for each in item.choices]
            return max(range(len(sums)), key=lambda i: sums[i] / sizes[i]) == item.gold

        return await self._each(task.source, task.items, score)

    async def _each(self, what: str, items: Sequence[T], ask: Callable[[T], Awaitable[R]]) -> list[R]:
        """What `ask` gives of every item, `concurrency` at a time."""
        gate, done = asyncio.Semaphore(self.options.concurrency), 0

        async def one(item: T) -> R:
            nonlocal done
            async with gate:
                answer = await ask(item)
            done += 1
            self.watch(Event("ask", done, len(items), {"of": what}))
            return answer

        return await asyncio.gather(*map(one, items))

    def _observed(self, found: WatchRound, first: WatchRound | None) -> WatchRound:
        """The round with its observations, whose ends hold over all rounds."""
        needed = evidence_needed(found.number, len(self.tasks) + SINGLE_SERIES)
        told = [_quality(task, found, needed) for task in self.tasks]
        told += _times(found, first, needed)
        failed = sum(found.errors.values())
        low, high = mean_bounds({1.0: failed, 0.0: found.requests - failed}, needed)
        share = _estimate(100 * failed / found.requests, (100 * low, 100 * high), found.requests)
        told.append(Observation("errors", "requests", "%", share, found.at))
        return replace(found, observations=tuple(each for each in told if each is not None))


def _is_right(answer: Completion, target: str, score: str) -> bool | RequestFailed:
    if answer.error is not None:
        return RequestFailed(answer.error, answer.detail)
    number = strict_number if score == "strict_match" else flexible_number
    return number(truncate_at_stop(answer.text or "")) == plain_number(target)


def _probe(answer: Completion) -> AnsweredProbe:
    if answer.error is not None or not answer.seconds:
        return AnsweredProbe(None, None)
    count = answer.pieces if answer.tokens is None else answer.tokens
    return AnsweredProbe(answer.seconds, count / answer.seconds if count else None)


def _estimate(value: float, bounds: Bounds, n: int) -> Estimate:
    return Estimate(value, *bounds, n, n, n >= FEW_CLUSTERS, "" if n >= FEW_CLUSTERS else "few_items")


def _quality(task: WatchTask, found: WatchRound, needed: float) -> Observation | None:
    """Points that a task lost over the items that were answered; None where none was."""
    marks, base = found.outcomes[task.source], task.baseline
    kept = [i for i, mark in enumerate(marks) if mark != "-"]
    if not kept:
        return None
    clusters, ones = tuple(base.clusters[i] for i in kept), (1,) * len(kept)
    before = replace(base, sums=tuple(base.sums[i] for i in kept), counts=ones, clusters=clusters)
    return points(task.source, before, replace(before, sums=tuple(float(marks[i]) for i in kept)), needed, found.at)


def points(source: str, before: EvalResult, now: EvalResult, needed: float, at: float) -> Observation:
    """Return the points of accuracy that a task lost."""
    low, high = loss_bounds(item_losses(before, now), needed)
    lost = _estimate(100 * (before.mean - now.mean), (100 * low, 100 * high), len(now.sums))
    return Observation("quality", source, "pp", replace(lost, clusters=len(set(now.clusters))), at)


def _times(found: WatchRound, first: WatchRound | None, needed: float) -> list[Observation | None]:
    """Medians over the probes: seconds and tokens per second, and how many times those of the first round."""
    told: list[Observation | None] = []
    for kind, unit, field in (("latency", "s", "seconds"), ("throughput", "tokens/s", "tokens_per_s")):
        now = [getattr(probe, field) for probe in found.probes]
        told.append(_median(kind, unit, [x for x in now if x is not None], needed, found.at))
        then = [getattr(probe, field) for probe in first.probes] if first is not None else []
        ratios = [y / x for x, y in zip(then, now, strict=False) if x is not None and y is not None]
        told.append(_median(kind, "x", ratios, needed, found.at))
    return told


def _median(kind: Any, unit: Any, values: Sequence[float], needed: float, at: float) -> Observation | None:
    if not values:
        return None
    estimate = _estimate(statistics.median(values), median_bounds(values, needed), len(values))
    return Observation(kind, "answers", unit, estimate, at)


# -- a folder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderRounds:
    """How a folder is evaluated each round on the sets of a baseline. What did not change is not measured again."""

    job: EvalContext
    model: str
    baseline: Baseline
    spec: ComparisonSpec

    @property
    def series(self) -> str:
        """A digest of what makes two rounds comparable."""
        sets = [[each.source, each.score, each.tokens] for each in self.baseline.sets]
        told = [self.model, self.baseline.name, self.baseline.fingerprint, self.baseline.compute, sets]
        told.append([*self.spec.texts, *self.spec.tasks])
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def measure(self, number: int, first: WatchRound | None) -> WatchRound:
        """Return round `number`. Raises FingerprintError where the folder has another tokenizer than the baseline."""
        at, tested = time.time(), evaluate_on_sets(self.job, self.model, self.spec)
        before = cached_results(self.job, self.baseline, tested)
        needed = evidence_needed(number, len(tested.results))
        step = caused_by(tested.teacher.folder)
        told, outcomes = [], {}
        for source, now in tested.results.items():
            if now.name in LOSS_EVALUATIONS:
                rise = _estimate(
                    now.mean - before[source].mean, nats_bounds(before[source], now, needed), len(now.sums)
                )
                told.append(Observation("quality", source, "%ppl", percent_lost(rise), at))
            else:
                outcomes[source] = "".join(str(int(mark)) for mark in now.sums)
                told.append(points(source, before[source], now, needed, at))
        return WatchRound(number, at, tuple(replace(each, step=step) for each in told), outcomes)
