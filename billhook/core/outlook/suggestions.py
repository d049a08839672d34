"""The registry of suggestions: what to try next, each a plain function of what a store knows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import yaml

from billhook.core.outlook.history import History
from billhook.core.registry import Registry
from billhook.core.results.json_form import JsonObject
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run

FEW = 9  # measured gains, below which their range is the interval
LEVEL = 0.9


@dataclass(frozen=True, slots=True)
class Gain:
    """An expected gain in nats per token, the median of `n` that were measured, with the interval of 90% of these.

    `source`: where they were: this store, or a page of the docs.
    """

    value: float
    low: float
    high: float
    n: int
    source: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a run brought that did what was suggested: nats per token, with an interval, and its seconds.

    The interval is that of two separate measurements on the same text, so that it is wider than one in pairs.
    """

    run: str
    value: float
    low: float
    high: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Situation:
    """A pruning that is done, and what the store knows of its model. `told`: its result as JSON; `nats`: lost."""

    run: Run
    told: JsonObject
    nats: float
    history: History
    everything: tuple[Run, ...]

    @property
    def recipe(self) -> JsonObject:
        """What the run was asked."""
        return self.run.spec

    def results(self) -> Iterator[tuple[Run, JsonObject]]:
        """Yield the prunings of the store that are done, of any model, with their results.

        These lack `plan`, `steps` and `anatomy`, which `told` has.
        """
        for run in self.everything:
            if run.kind == PRUNE and run.result is not None and run.result.get("schema") is not None:
                yield run, run.result


@dataclass(frozen=True, slots=True)
class Idea:
    """What a suggestion returns. `changes`: fields of the recipe for a new pruning, or else the `command` to type.

    `gain`: None where nothing measured says what it brings; `seconds`: as long as it takes; `facts`: numbers by name.
    """

    changes: Mapping[str, object] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    gain: Gain | None = None
    seconds: float | None = None
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


Suggest = Callable[[Situation], Idea | None]
SUGGESTIONS: Registry[Suggest] = Registry("suggestion")
suggestion = SUGGESTIONS.add


def gain_of(shares: Iterable[float], nats: float, source: str) -> Gain | None:
    """Return the gain from shares of the loss that were won back elsewhere; None where there are none."""
    ranked = sorted(shares)
    if not ranked:
        return None
    out = 0 if len(ranked) < FEW else int((1 - LEVEL) / 2 * (len(ranked) + 1))
    ends = ranked[out], ranked[-1 - out]
    return Gain(statistics.median(ranked) * nats, ends[0] * nats, ends[1] * nats, len(ranked), source)


def gain_here_or_shipped(own: Sequence[float], name: str, nats: float) -> Gain | None:
    """Return the gain by what this store measured, else by the docs' figures under a name; None without either."""
    if own:
        return gain_of(own, nats, "this store")
    shipped = shipped_gains().get(name)
    return None if shipped is None else gain_of(shipped[0], nats, shipped[1])


@cache
def shipped_gains() -> Mapping[str, tuple[tuple[float, ...], str]]:
    """Shares of the loss that were won back in benchmarks/measured, by suggestion, with the page that tells them."""
    told = yaml.safe_load(files("billhook.core.outlook").joinpath("gains.yaml").read_text(encoding="utf-8"))
    return {name: (tuple(row["shares"]), row["source"]) for name, row in told.items()}


def lost_nats(told: Mapping[str, JsonObject]) -> float | None:
    """Return what the student of a pruning loses on held-out text, in nats per token; None if not measured."""
    change = told.get("perplexity")
    return None if change is None else math.log(float(change["ratio"]["value"]))
