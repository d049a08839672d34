"""What a watch finds, round by round, and the alerts of a store. Plain values; no sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from billhook.core.monitoring.alerts import Alert, Observation
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.measured import estimate_columns


@dataclass(frozen=True, slots=True)
class AnsweredProbe:
    """One prompt that is asked for its time: seconds to the whole answer, tokens per second; None where it failed."""

    seconds: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """The time of one prompt, which a digest names."""

    prompt: str
    probe: AnsweredProbe


@dataclass(frozen=True, slots=True)
class ServedBaseline:
    """How a server was asked whose answers and times are a baseline."""

    url: str
    model: str
    kind: str
    max_tokens: int
    concurrency: int
    times: tuple[TimedPrompt, ...]

    def probes_of(self, prompts: Sequence[str]) -> tuple[AnsweredProbe, ...]:
        """Return the times of prompts, in their order; None of those that were not asked."""
        known = {each.prompt: each.probe for each in self.times}
        return tuple(known.get(prompt_digest(text), AnsweredProbe(None, None)) for text in prompts)


def prompt_digest(text: str) -> str:
    """Return 16 hex digits that name a prompt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class WatchRound:
    """One evaluation of a watch: `number`, from 1, and when, in seconds since 1970.

    - `observations`: with ends that hold over all rounds of the series at once.
    - `outcomes`: of each task, a character an item: 1 right, 0 wrong, - not answered.
    - `errors`: how many requests failed, by kind; `first_errors`: what the first of each said.
    """

    number: int
    at: float
    observations: tuple[Observation, ...]
    outcomes: dict[str, str] = field(default_factory=dict)
    probes: tuple[AnsweredProbe, ...] = ()
    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    first_errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class WatchResult(Result):
    """A server or a folder over time against a baseline.

    - `rounds`: of the whole series, in which a watch that starts again goes on; `observations`: of the last of them.
    - `alerts`: those that held at some time in this run, when they began.
    - `alpha`: the chance that a series without change ever raises one.
    """

    kind: ClassVar[str] = "watch"

    target: str
    model: str
    baseline: str
    series: str
    rounds: int
    every_s: float
    observations: tuple[Observation, ...]
    alerts: tuple[Alert, ...]
    alpha: float
    run: str = ""

    def rows(self) -> list[JsonObject]:
        """A row for each observation."""
        return [
            {"at": each.at, "kind": each.kind, "what": each.what, "unit": each.unit, "against": each.against}
            | {"n": each.value.n}
            | estimate_columns("value", each.value)
            for each in self.observations
        ]

    def __repr__(self) -> str:
        return f"WatchResult({self.target} against {self.baseline}: {self.rounds} rounds, {len(self.alerts)} alerts)"


@dataclass(frozen=True, repr=False)
class AlertList(Result):
    """The alerts of a store: those that its runs told of, and those that hold now."""

    kind: ClassVar[str] = "alerts"

    told: tuple[Alert, ...]
    now: tuple[Alert, ...]

    def rows(self) -> list[JsonObject]:
        """A row for each alert."""
        return [
            {"state": state, "rule": each.rule, "severity": each.severity, "kind": each.kind, "what": each.what}
            | {"unit": each.unit, "against": each.against, "threshold": each.threshold, "since": each.since}
            | {"step": each.step}
            | estimate_columns("value", each.value)
            for state, alerts in (("now", self.now), ("told", self.told))
            for each in alerts
        ]
