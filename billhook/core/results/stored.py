"""What the store says of its runs: a line each, and everything of one."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import billhook.core.results
from billhook.core.events import EventValue
from billhook.core.results.json_form import RESULTS, SCHEMA, JsonObject, Result, encode
from billhook.core.results.specs import PRUNE


def read_result(kind: str, value: JsonObject) -> Result | JsonObject:
    """The result of a run of a `kind`. Billhook 0.1 wrote results without a schema: they stay as they were stored."""
    if value.get("schema") != SCHEMA:
        return value
    for module in pkgutil.iter_modules(billhook.core.results.__path__):  # each may hold the class of a kind
        import_module(f"billhook.core.results.{module.name}")
    return RESULTS[kind].from_json(value) if kind in RESULTS else value


RunState = Literal["running", "interrupted", "failed", "done"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the store. `kind`: prune, sweep, compare, …; `spec`: what it was asked, of a pruning its recipe.

    `result` is JSON, as the run stored it. What runs of Billhook 0.1 were asked, prunings aside, was not kept: their
    `spec` is a recipe that holds what they had in common with one.
    """

    id: str
    kind: str
    created: float  # seconds since 1970, UTC
    state: RunState
    out: str
    spec: JsonObject
    environment: JsonObject
    fingerprints: dict[str, str]  # fingerprints of model and tokens, once they are known
    result: JsonObject | None


FORMER_KINDS = {"trade": "transfer"}


def former_kind(environment: JsonObject) -> tuple[str, JsonObject]:
    """The kind of a run, and its environment, from an environment that tells both."""
    kind: str = environment.get("laboratory", PRUNE)
    return FORMER_KINDS.get(kind, kind), {name: value for name, value in environment.items() if name != "laboratory"}


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run in a list. `remove`, `search`: None of a run without them; `losses`: those that it measured itself."""

    run: str
    kind: str
    created: float  # seconds since 1970, UTC
    state: str
    model: str
    remove: str | None
    search: str | None
    out: str
    losses: int

    def to_json(self) -> JsonObject:
        """Every field as plain JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """What a stage of a run had done at a time, in seconds since 1970.

    `resources`: what the process used by then: `cpu_seconds`, `memory_bytes`, and `gpu_memory_bytes` with a GPU.
    """

    at: float
    stage: str
    done: int
    total: int | None
    values: Mapping[str, EventValue]
    resources: Mapping[str, float | int]


@dataclass(frozen=True, repr=False)
class StoredRun:
    """All that the store holds of one run. `spec`: what was asked; `losses`: how many it measured itself.

    `result`: None until it is done, an object of the class of its kind, and plain JSON where Billhook 0.1 stored it.
    """

    id: str
    kind: str
    created: float
    state: str
    out: str
    spec: Mapping[str, Any]
    environment: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    losses: int
    events: tuple[StoredEvent, ...]
    result: Result | JsonObject | None

    def to_json(self) -> JsonObject:
        """Every field as plain JSON; the result as it is stored."""
        plain = {name: encode(getattr(self, name)) for name in self.__dataclass_fields__ if name != "result"}
        return plain | {"result": self.result.to_json() if isinstance(self.result, Result) else self.result}

    def rows(self) -> list[JsonObject]:
        """The events as a flat table: a column for every value and every resource that any of them has."""
        columns = dict.fromkeys(name for event in self.events for name in (*event.values, *event.resources))
        return [
            {"at": event.at, "stage": event.stage, "done": event.done, "total": event.total}
            | {name: event.values.get(name, event.resources.get(name)) for name in columns}
            for event in self.events
        ]

    def __repr__(self) -> str:
        return f"StoredRun({self.id}: {self.kind}, {self.state}, {len(self.events)} events)"
