"""One round of a watch: what a server, or a folder, loses against a baseline, and how fast and how often it answers."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from billhook.core.errors import EndpointError, FingerprintError
from billhook.core.monitoring.alerts import Against, Observation
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
from billhook.core.results.comparisons import Baseline
from billhook.core.results.json_form import encode
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.monitoring import ServedBaseline, WatchRound
from billhook.core.statistics import FEW_CLUSTERS, LOSS_EVALUATIONS
from billhook.runs.job import EvalContext
from billhook.studies.eval_sets import ComparisonSpec, evaluate_on_sets
from billhook.studies.gate import cached_results
from billhook.studies.monitoring.lineage import caused_by
from billhook.studies.servers.asking import AskedTask, Questions, read_asked_task

SINGLE_SERIES = 5  # beside the tasks: latency and throughput, absolute and by the first round, and errors
BASELINE_SERIES = 2  # latency and throughput by those of the baseline


@dataclass(frozen=True)
class WatchTask:
    """A task of a baseline as a server is asked it, and what the baseline got on each item."""

    asked: AskedTask
    baseline: EvalResult


def read_watch_task(baseline: Baseline, source: str, result: EvalResult) -> WatchTask:
    """Return a task of a baseline with its `result` there. Raises FingerprintError if the file has other items now."""
    asked = read_asked_task(baseline.items, source)
    if asked.clusters != result.clusters:
        raise FingerprintError(
            f"{source} has other items than the baseline {baseline.name} was measured on: the file has changed. Save "
            "a new baseline."
        )
    return WatchTask(asked, result)


# -- a server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointRounds:
    """How a server is held against a baseline each round. `served`: the baseline's times, if it is of a server."""

    questions: Questions
    tasks: tuple[WatchTask, ...]
    served: ServedBaseline | None = None

    @property
    def series(self) -> str:
        """A digest of what makes two rounds comparable."""
        end, options = self.questions.endpoint, self.questions.options
        told = [end.url, end.model, options.kind, options.max_tokens, self.questions.probes]
        tasks = [[task.asked.source, task.asked.score, task.asked.digest, task.baseline.sums] for task in self.tasks]
        times = [] if self.served is None else [encode(self.served)]
        return hashlib.sha256(json.dumps([told, tasks, *times]).encode()).hexdigest()[:12]

    def measure(self, number: int, first: WatchRound | None) -> WatchRound:
        """Return round `number`; `first`: the first of the series, whose times are a reference.

        A server that cannot be asked is a round of failed requests, but for the first one: raises EndpointError.
        """
        at = time.time()
        try:
            found = self.questions.ask()
        except EndpointError as error:
            if first is None:
                raise
            found = self.questions.unreachable(error)
        return self._observed(replace(found, number=number, at=at), first)

    def _observed(self, found: WatchRound, first: WatchRound | None) -> WatchRound:
        """The round with its observations, whose ends hold over all rounds."""
        series = len(self.tasks) + SINGLE_SERIES + (BASELINE_SERIES if self.served is not None else 0)
        needed = evidence_needed(found.number, series)
        told = [_quality(task, found, needed) for task in self.tasks]
        told += _times(found, needed) if first is None else [*_times(found, needed), *_ratios(found, first, needed)]
        if self.served is not None:
            then = replace(found, probes=self.served.probes_of(self.questions.prompts()))
            told += _ratios(found, then, needed, "baseline")
        failed = sum(found.errors.values())
        low, high = mean_bounds({1.0: failed, 0.0: found.requests - failed}, needed)
        share = _estimate(100 * failed / found.requests, (100 * low, 100 * high), found.requests)
        told.append(Observation("errors", "requests", "%", share, found.at))
        return replace(found, observations=tuple(each for each in told if each is not None))


def _estimate(value: float, bounds: Bounds, n: int) -> Estimate:
    return Estimate(value, *bounds, n, n, n >= FEW_CLUSTERS, "" if n >= FEW_CLUSTERS else "few_items")


def _quality(task: WatchTask, found: WatchRound, needed: float) -> Observation | None:
    """Points that a task lost over the items that were answered; None where none was."""
    source, base = task.asked.source, task.baseline
    marks = found.outcomes[source]
    kept = [i for i, mark in enumerate(marks) if mark != "-"]
    if not kept:
        return None
    clusters, ones = tuple(base.clusters[i] for i in kept), (1,) * len(kept)
    before = replace(base, sums=tuple(base.sums[i] for i in kept), counts=ones, clusters=clusters)
    return points(source, before, replace(before, sums=tuple(float(marks[i]) for i in kept)), needed, found.at)


def points(source: str, before: EvalResult, now: EvalResult, needed: float, at: float) -> Observation:
    """Return the points of accuracy that a task lost."""
    low, high = loss_bounds(item_losses(before, now), needed)
    lost = _estimate(100 * (before.mean - now.mean), (100 * low, 100 * high), len(now.sums))
    return Observation("quality", source, "pp", replace(lost, clusters=len(set(now.clusters))), at)


TIMES: tuple[tuple[Literal["latency", "throughput"], Literal["s", "tokens/s"], str], ...]
TIMES = (("latency", "s", "seconds"), ("throughput", "tokens/s", "tokens_per_s"))


def _times(found: WatchRound, needed: float) -> list[Observation | None]:
    """Medians over the probes, in seconds and tokens per second."""
    return [
        _median(kind, unit, [x for probe in found.probes if (x := getattr(probe, field)) is not None], needed, found.at)
        for kind, unit, field in TIMES
    ]


def _ratios(found: WatchRound, then: WatchRound, needed: float, against: Against = "") -> list[Observation | None]:
    """Medians over the probes of how many times those of `then` they are, each prompt in a pair with itself."""
    told: list[Observation | None] = []
    for kind, _, field in TIMES:
        pairs = [(getattr(a, field), getattr(b, field)) for a, b in zip(then.probes, found.probes, strict=False)]
        ratios = [after / before for before, after in pairs if before is not None and after is not None]
        each = _median(kind, "x", ratios, needed, found.at)
        told.append(None if each is None else replace(each, against=against))
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
