"""What each kind of run is asked, as frozen plain values: the store keeps it with the run.

A pruning is asked by its recipe. `options` of the others: the fields of a recipe that were given, as they were given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from billhook.core.options import BasisRule, RankRule
from billhook.core.results.json_form import JsonObject, decode, encode
from billhook.core.results.measured import TimingProtocol

PRUNE = "prune"  # the kind of a run that is asked by a recipe and makes a checkpoint

Options = JsonObject


def plain_options(options: Mapping[str, Any]) -> Options:
    """Options as plain values: paths become text, tuples become lists."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass(frozen=True)
class RunSpec:
    """What one run is asked. Abstract: every kind of run has a frozen dataclass; `kind` names it in the store."""

    kind: ClassVar[str]

    def to_json(self) -> JsonObject:
        """Every field as plain JSON."""
        return {f.name: encode(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """The spec that `to_json` wrote. Raises ResultError where a field is missing."""
        return decode(cls, value)


@dataclass(frozen=True)
class SweepSpec(RunSpec):
    """Recipes at several sizes on several calibration texts. `eval_data`: empty for the texts of `data`."""

    kind = "sweep"
    model: str
    recipes: tuple[str, ...]
    remove: tuple[str, ...]
    data: tuple[str, ...]
    eval_data: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int
    options: Options


@dataclass(frozen=True)
class TransferSpec(RunSpec):
    """Prunings for each of `tasks`, measured on each."""

    kind = "transfer"
    model: str
    tasks: tuple[str, ...]
    items: int
    options: Options


@dataclass(frozen=True)
class StabilitySpec(RunSpec):
    """`draws` disjoint calibration sets of each of `sizes` tokens."""

    kind = "stability"
    model: str
    metric: str
    sizes: tuple[int, ...]
    draws: int
    options: Options


@dataclass(frozen=True)
class ThresholdSpec(RunSpec):
    """The last step within every margin. `steps_of`: the run whose steps are taken; None for a search by `recipe`."""

    kind = "threshold"
    model: str
    margins: tuple[str, ...]
    steps_of: str | None
    recipe: Options


@dataclass(frozen=True)
class EvalItems:
    """What models are evaluated on. `items`: of each task, None for all; `shots`: solved items before each."""

    data: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int | None
    shots: int
    shots_from: str


@dataclass(frozen=True)
class CompareSpec(RunSpec):
    """`model` and the `others`, which are compared with it. `margins`: of accuracy and of perplexity."""

    kind = "compare"
    model: str
    others: tuple[str, ...]
    on: EvalItems
    score: tuple[str, ...]
    margins: tuple[str, ...]
    timed: bool
    seen: bool
    options: Options


@dataclass(frozen=True)
class GateSpec(RunSpec):
    """Whether `model` is not worse than `baseline`, a model or a stored baseline, by more than `margins`."""

    kind = "gate"
    model: str
    baseline: str
    on: EvalItems
    score: tuple[str, ...]
    margins: tuple[str, ...]
    seen: bool
    options: Options


@dataclass(frozen=True)
class BaselineSpec(RunSpec):
    """A model that is measured and kept under a `name`."""

    kind = "baseline"
    name: str
    model: str
    on: EvalItems
    score: tuple[str, ...]
    options: Options


@dataclass(frozen=True)
class EvalSpec(RunSpec):
    """One model on tasks. `evaluations`: by name; empty for the scores of the tasks."""

    kind = "eval"
    model: str
    on: EvalItems
    evaluations: tuple[str, ...]
    options: Options


@dataclass(frozen=True)
class ExportSpec(RunSpec):
    """A checkpoint in the form `to`. `dtype`: of its weights; `verify`: in the software that serves it."""

    kind = "export"
    model: str
    to: str
    dtype: str | None
    verify: bool | None


@dataclass(frozen=True)
class VocabularySpec(RunSpec):
    """A model without the tokens that `data` does not need, of which `tokens` are counted at most.

    `remove`: a share of the vocabulary; None for all that it does not use. `eval_data`: held-out texts; empty
    for a part of `data`.
    """

    kind = "vocabulary"
    model: str
    data: str
    remove: str | None
    eval_data: tuple[str, ...]
    tokens: int
    options: Options


@dataclass(frozen=True)
class FactorSpec(RunSpec):
    """A model with low-rank factors that save `remove` parameters, fitted on `data`.

    `eval_data`: held-out text; None for a part of `data`. `ranks`: what they are chosen by.
    """

    kind = "factor"
    model: str
    remove: str
    data: str
    eval_data: str | None
    options: Options
    ranks: RankRule = "energy"


@dataclass(frozen=True)
class SliceSpec(RunSpec):
    """A model with a residual stream of `width` channels, or of that share, by bases from the text `data`.

    `eval_data`: held-out texts; empty for a part of `data`. `bases`: one of all boundaries, or one of each.
    """

    kind = "slice"
    model: str
    width: str
    data: str
    eval_data: tuple[str, ...]
    options: Options
    bases: BasisRule = "one"


@dataclass(frozen=True)
class SpeedSpec(RunSpec):
    """The speed of `model`, or of it and an `other` in turn. `engine`: the runtime that serves them; None: here."""

    kind = "speed"
    model: str
    other: str | None
    engine: str | None
    device: str
    dtype: str
    protocol: TimingProtocol


@dataclass(frozen=True)
class ServerSpec:
    """An OpenAI-compatible server. `api_key_env`: the name of the environment variable that holds its key."""

    url: str
    model: str
    api_key_env: str


@dataclass(frozen=True)
class AbTestSpec(RunSpec):
    """Two servers on the same `prompts`, of which `limit` are asked. `requests`: how they are asked."""

    kind = "abtest"
    model: str  # both addresses, as a list of runs shows them
    a: ServerSpec
    b: ServerSpec
    prompts: str
    limit: int | None
    requests: Options


@dataclass(frozen=True)
class WatchSpec(RunSpec):
    """A server or a folder, `model`, that is held against a `baseline` every `every_s` seconds, `rounds` times.

    `served`: how a server is asked; None of a folder. `rules`: the file; empty for those of Billhook.
    """

    kind = "watch"
    model: str
    baseline: str
    tasks: tuple[str, ...]
    every_s: float
    rounds: int | None
    rules: str
    probes: int
    served: ServerSpec | None
    requests: Options
