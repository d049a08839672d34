"""The keys under which the store keeps measured values: everything that a value depends on, each a typed field.

A key knows its table, its columns there, and how its values are written; nothing else spells them. What Billhook 0.1
stored stands under the same text. Models and token sets are named by fingerprint and hash; `dtype` is the compute dtype
and the kind of device.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar, get_args

from billhook.core.plan import Plan
from billhook.core.results.json_form import JsonObject, decode, encode
from billhook.core.results.measured import Environment, EvalResult, Loss, Timing, TimingProtocol
from billhook.core.results.monitoring import WatchRound

T = TypeVar("T")


class CacheKey(ABC, Generic[T]):
    """What one stored value depends on. Abstract; frozen dataclasses extend it. Two equal ones have the same value."""

    table: ClassVar[str]
    replaces: ClassVar[bool] = False  # whether a later value takes the place of an earlier one

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Name and text of every column of the key."""

    @abstractmethod
    def encode(self, value: T) -> dict[str, str]:
        """Name and text of every column of a value."""

    @abstractmethod
    def decode(self, row: Mapping[str, str]) -> T:
        """The value that `encode` wrote."""


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def numbers(text: str) -> tuple[Any, ...]:
    """The numbers of a JSON list. Raises ValueError or TypeError for anything else."""
    value = json.loads(text)
    if not isinstance(value, list) or not all(type(each) in (int, float) for each in value):
        raise TypeError(f"{text[:80]!r} is no list of numbers")
    return tuple(value)


def _equally_many(row: Mapping[str, str], *names: str) -> list[tuple[Any, ...]]:
    lists = [numbers(row[name]) for name in names]
    if len({len(each) for each in lists}) > 1:
        raise ValueError(f"{' and '.join(names)} have different lengths")
    return lists


# -- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoldedOn:
    """A fold inside the search, before a plan is judged: on which tokens, with which `reach`."""

    tokens: str
    reach: str

    def __str__(self) -> str:
        return f"fold {json.dumps([self.tokens, {'reach': self.reach}])}"


@dataclass(frozen=True, slots=True)
class LossKey:
    """What the losses of a search depend on, but for the plan. `treatment`: what is done to a plan before."""

    model: str
    tokens: str
    loss: str
    dtype: str
    treatment: FoldedOn | None = None

    def columns(self) -> dict[str, str]:
        """Name and text of every column."""
        treatment = "" if self.treatment is None else str(self.treatment)
        return {"model": self.model, "tokens": self.tokens, "loss": self.loss, "dtype": self.dtype,
                "treatment": treatment}  # fmt: skip


@dataclass(frozen=True)
class PlanLossKey(CacheKey[Loss]):
    """The loss of one plan, measured in full."""

    table = "losses"
    search: LossKey
    plan: Plan

    def columns(self) -> dict[str, str]:
        return self.search.columns() | {"plan": self.plan.key()}

    def encode(self, value: Loss) -> dict[str, str]:
        assert not value.bound
        return {"sites": _json(self.plan.to_list()), "sums": _json(value.sums), "counts": _json(value.counts)}

    def decode(self, row: Mapping[str, str]) -> Loss:
        sums, counts = _equally_many(row, "sums", "counts")
        return Loss(self.search.loss, sums, counts)


# -- evaluations and timings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedWith:
    """An evaluation of how alike a model is to another one: `kl`, or `agreement`; that one by fingerprint and dtype."""

    name: str
    model: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {'to' if self.name == 'kl' else 'with'} {self.model} {self.dtype}"


@dataclass(frozen=True)
class EvaluationKey(CacheKey[EvalResult]):
    """One evaluation of what `plan` leaves of a model. `repair`: the key of one; empty: none."""

    table = "evaluations"
    model: str
    plan: Plan
    name: str | ComparedWith
    tokens: str
    dtype: str
    repair: str = ""

    def columns(self) -> dict[str, str]:
        return {"model": self.model, "plan": self.plan.key(), "name": str(self.name), "tokens": self.tokens,
                "dtype": repaired_dtype(self.dtype, self.repair)}  # fmt: skip

    def encode(self, value: EvalResult) -> dict[str, str]:
        return {"sums": _json(value.sums), "counts": _json(value.counts), "clusters": _json(value.clusters)}

    def decode(self, row: Mapping[str, str]) -> EvalResult:
        return EvalResult(str(self.name), self.tokens, *_equally_many(row, "sums", "counts", "clusters"))


def repaired_dtype(dtype: str, repair: str) -> str:
    """The text under which the store keeps evaluations of a repaired model."""
    return f"{dtype}, repaired {repair}" if repair else dtype


@dataclass(frozen=True)
class TimingKey(CacheKey[Timing]):
    """The speed of what `plan` leaves of a model, timed in turn with what `rival` leaves.

    `patches`: what a repair adds to the student's shape; `stock`: its removed sites hold zeros.
    """

    table = "timings"
    replaces = True
    model: str
    plan: Plan
    rival: Plan
    environment: Environment
    dtype: str
    protocol: TimingProtocol
    patches: tuple[Mapping[str, Any], ...] = ()
    stock: bool = False

    def columns(self) -> dict[str, str]:
        shape = "stock" if self.stock else json.dumps(self.patches) if self.patches else ""
        return {"model": self.model, "plan": self.plan.key(), "rival": self.rival.key(), "dtype": self.dtype,
                "environment": _json(asdict(self.environment)),
                "protocol": json.dumps(asdict(self.protocol)) + shape}  # fmt: skip

    def encode(self, value: Timing) -> dict[str, str]:
        return {"timing": _json(asdict(value))}

    def decode(self, row: Mapping[str, str]) -> Timing:
        return decode(Timing, json.loads(row["timing"]))


# -- everything else --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactKey(CacheKey[T]):
    """A value of plain JSON about a `model`. Abstract; `what` names the kind."""

    table = "facts"
    what: ClassVar[str]
    model: str

    def parts(self) -> JsonObject:
        """Everything but the model that the value depends on, as plain JSON; a plan by its key."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"}
        return {name: value.key() if isinstance(value, Plan) else value for name, value in values.items()}

    def columns(self) -> dict[str, str]:
        return {"model": self.model, "what": self.what, "of": _json(self.parts())}

    def encode(self, value: T) -> dict[str, str]:
        return {"value": _json(value)}

    def decode(self, row: Mapping[str, str]) -> T:
        (kind,) = get_args(next(base for base in type(self).__orig_bases__ if get_args(base)))  # type: ignore[attr-defined]
        return decode(kind, json.loads(row["value"]))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ScoresKey(FactKey[JsonObject]):
    """The scores of a metric by unit: a number, or of channel groups a list."""

    what = "scores"
    metric: str
    options: Mapping[str, Any]
    tokens: str
    loss: str
    dtype: str


@dataclass(frozen=True)
class ChoicesKey(FactKey[list[float]]):
    """Log-probabilities of the choices in some rows of a task, by what `plan` leaves of a model; `repair`: its key."""

    what = "choices"
    plan: Plan
    dtype: str
    tokens: str
    repair: str = ""

    def parts(self) -> JsonObject:
        return {"plan": self.plan.key(), "dtype": repaired_dtype(self.dtype, self.repair), "tokens": self.tokens}


@dataclass(frozen=True)
class AnswersKey(FactKey[list[str]]):
    """What the model answers to some prompts."""

    what = "written"
    plan: Plan
    dtype: str
    prompts: str


@dataclass(frozen=True)
class GeneratedKey(FactKey[list[str]]):
    """The texts that the model writes for its own calibration."""

    what = "written"
    tokens: int
    length: int
    seed: int


@dataclass(frozen=True)
class HarnessKey(FactKey[list[Any]]):
    """Answers to requests of one kind of lm-evaluation-harness. `asked`: a digest of the requests."""

    what = "lmeval"
    plan: Plan
    dtype: str
    kind: str
    asked: str


@dataclass(frozen=True)
class SiteTimesKey(FactKey[dict[str, int]]):
    """Nanoseconds that each site takes of a decoding step."""

    what = "ns"
    batch: int
    context: int
    dtype: str
    machine: str
    threads: int
    torch: str


@dataclass(frozen=True)
class BandwidthKey(FactKey[float]):
    """Bytes per second at which a device reads."""

    what = "bandwidth"
    environment: Environment

    def parts(self) -> JsonObject:
        return asdict(self.environment)


@dataclass(frozen=True)
class TrialPlan:
    """The plan of a trial, and what its search took. `resumed`: an earlier attempt was interrupted."""

    plan: Plan
    seconds: float
    site_evaluations: float
    resumed: bool


@dataclass(frozen=True)
class PlanKey(FactKey[TrialPlan]):
    """The plan to which a recipe leads on a calibration set. `recipe`: its fields that matter for that.

    `site_times`: of a budget in time. `refitted_on`: the tokens of a fold inside the search.
    """

    what = "plan"
    recipe: Mapping[str, Any]
    tokens: str
    compute: str
    site_times: SiteTimesKey | None = None
    refitted_on: str | None = None

    def parts(self) -> JsonObject:
        parts: JsonObject = {"recipe": self.recipe, "tokens": self.tokens, "compute": self.compute}
        if self.site_times is not None:
            parts["ns"] = self.site_times.parts()
        return parts if self.refitted_on is None else parts | {"refitted": self.refitted_on}

    def encode(self, value: TrialPlan) -> dict[str, str]:
        told = {"removed": value.plan.to_list(), "seconds": value.seconds, "site_evaluations": value.site_evaluations,
                "resumed": value.resumed}  # fmt: skip
        return {"value": _json(told)}

    def decode(self, row: Mapping[str, str]) -> TrialPlan:
        told = json.loads(row["value"])
        plan = Plan.parse(told["removed"])
        return TrialPlan(plan, told["seconds"], told["site_evaluations"], told.get("resumed", False))


@dataclass(frozen=True)
class FinalistsKey(FactKey[list[JsonObject]]):
    """The plans with which a search ended, for all sizes. `recipe`: what matters of it to a search."""

    what = "finalists"
    replaces = True
    recipe: Mapping[str, Any]
    tokens: str


@dataclass(frozen=True)
class AttemptKey(FactKey[str]):
    """The run that first began the search of a plan."""

    what = "attempt"
    plan: PlanKey

    def parts(self) -> JsonObject:
        return self.plan.parts()


@dataclass(frozen=True)
class BaselineKey(FactKey[JsonObject]):
    """A baseline by its name, of whatever model."""

    what = "baseline"
    name: str


@dataclass(frozen=True)
class WatchRoundKey(FactKey[WatchRound]):
    """One round of a `series` of a watch of a model or a server, from 1."""

    what = "watch"
    series: str
    number: int

    def encode(self, value: WatchRound) -> dict[str, str]:
        return {"value": _json(encode(value))}
