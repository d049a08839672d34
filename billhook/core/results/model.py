"""What one model gives unpruned: its anatomy, scores, evaluations and speed, and what a pruning would take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from billhook.core.anatomy import Anatomy, ModelSizes
from billhook.core.errors import UsageError
from billhook.core.plan import Plan, Site
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.measured import (
    EnergyCounters,
    Environment,
    Estimate,
    TimingProtocol,
    TokenSetInfo,
    WorkPlan,
    estimate_columns,
)
from billhook.core.results.run import PredictedSpeed, Rates, RunData, SpeedRatio


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes: of the weights, of what the search keeps, and what is free."""

    weights: int
    kept_for_search: int
    free: int


@dataclass(frozen=True, slots=True)
class ExpectedSeconds:
    """About how long a pruning takes. `search`: None where a search does not say how many losses it asks for.

    `recover`: all recoveries, each with its proof on held-out text.
    """

    search: float | None
    evaluate: float
    recover: float = 0.0


@dataclass(frozen=True, repr=False)
class WorkEstimate(Result):
    """What a pruning would measure, and what it would take. `losses`: None where a search does not say."""

    kind: ClassVar[str] = "dry_run"

    model: str
    remove: str
    losses: int | None
    data: RunData
    memory: MemoryUse
    work: WorkPlan
    disk_bytes: int
    seconds: ExpectedSeconds

    def rows(self) -> list[JsonObject]:
        """One row."""
        return [{
            "model": self.model, "remove": self.remove, "losses": self.losses,
            "calibration_tokens": self.data.calibration.tokens, "evaluation_tokens": self.data.evaluation.tokens,
            "weight_bytes": self.memory.weights, "kept_bytes": self.memory.kept_for_search,
            "free_bytes": self.memory.free, "disk_bytes": self.disk_bytes,
            "search_seconds": self.seconds.search, "evaluate_seconds": self.seconds.evaluate,
            "recover_seconds": self.seconds.recover,
        }]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """The anatomy of a model: every site in numbers, and totals."""

    kind: ClassVar[str] = "inspect"

    model: str
    type: str
    fingerprint: str
    dtype: str
    already_removed: Plan
    anatomy: Anatomy
    total: ModelSizes

    def rows(self) -> list[JsonObject]:
        """A row a site."""
        return [
            {"site": str(size.site), "parameters": size.parameters, "bytes": size.bytes,
             "kv_bytes_per_token": size.kv_bytes_per_token, "flops_per_token": size.flops_per_token,
             "groups": len(size.groups)}
            for size in self.anatomy.sites
        ]  # fmt: skip


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteScore:
    """A metric's score of a site: higher = removal hurts more. `low`, `high`: 95%, where the metric gives an error."""

    site: Site
    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class BlockScore:
    """The same of a whole block."""

    block: int
    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class SpanScore:
    """The same of all blocks from `first` to `last`, which are `length`."""

    first: int
    last: int
    length: int
    value: float
    se: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores of the channel groups of a site, in the order of their `numbers`."""

    site: Site
    numbers: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MetricScores:
    """All that one metric says."""

    sites: tuple[SiteScore, ...] = ()
    blocks: tuple[BlockScore, ...] = ()
    spans: tuple[SpanScore, ...] = ()
    groups: tuple[GroupScores, ...] = ()


@dataclass(frozen=True, repr=False)
class ScoreTable(Result):
    """Importance scores of a model by metric. Of a single metric `sites`, `blocks`, `spans` and `groups` are at hand.

    `bytes_read`: from disk, where the model was `streamed`; `set`: the options that were given.
    """

    kind: ClassVar[str] = "score"

    model: str
    fingerprint: str
    set: JsonObject
    scores: dict[str, MetricScores]
    data: TokenSetInfo
    streamed: bool
    bytes_read: int
    seconds: float

    @property
    def sites(self) -> tuple[SiteScore, ...]:
        return self._only("sites").sites

    @property
    def blocks(self) -> tuple[BlockScore, ...]:
        return self._only("blocks").blocks

    @property
    def spans(self) -> tuple[SpanScore, ...]:
        return self._only("spans").spans

    @property
    def groups(self) -> tuple[GroupScores, ...]:
        return self._only("groups").groups

    def _only(self, what: str) -> MetricScores:
        if len(self.scores) != 1:
            raise UsageError(f"These are scores by {', '.join(self.scores)}. Choose one: .scores[NAME].{what}")
        return next(iter(self.scores.values()))

    def rows(self) -> list[JsonObject]:
        """A row for every site, block, span and channel group of every metric; `unit` names it."""
        rows = []
        for metric, scores in self.scores.items():
            named: list[tuple[str, str, SiteScore | BlockScore | SpanScore]]
            named = [("site", str(s.site), s) for s in scores.sites]
            named += [("block", str(s.block), s) for s in scores.blocks]
            named += [("span", f"{s.first}-{s.last}", s) for s in scores.spans]
            rows += [
                {"metric": metric, "of": of, "unit": unit, "value": s.value, "se": s.se, "low": s.low, "high": s.high}
                for of, unit, s in named
            ]
            rows += [
                {"metric": metric, "of": "group", "unit": f"{s.site}[{number}]", "value": value, "se": None,
                 "low": None, "high": None}
                for s in scores.groups for number, value in zip(s.numbers, s.values, strict=True)
            ]  # fmt: skip
        return rows


# -- evaluations and speed -------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What evaluations say of a model on one text. `perplexity`, bits and words are None where others were named.

    `perplexity`: with its interval over texts; `bits_per_byte` and `word_perplexity` compare tokenizers;
    `evaluations`: those that were asked for by name.
    """

    kind: ClassVar[str] = "evaluation"

    model: str
    data: TokenSetInfo
    protocol: str | None = None
    perplexity: Estimate | None = None
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    evaluations: dict[str, Estimate] = field(default_factory=dict)

    def rows(self) -> list[JsonObject]:
        """A row an evaluation."""
        found = ({"perplexity": self.perplexity} if self.perplexity else {}) | self.evaluations
        return [
            {"model": self.model, "data": self.data.source, "evaluation": name, **estimate_columns("value", estimate),
             "n": estimate.n, "clusters": estimate.clusters, "reliable": estimate.reliable}
            for name, estimate in found.items()
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelRates:
    """Speed of one model. `kv_bytes`: of the KV cache, where a runtime says them."""

    model: str
    rates: Rates
    kv_bytes: int | None = None


@dataclass(frozen=True, repr=False)
class SpeedReport(Result):
    """Speed of one model, or of two timed in turn. `ratio`: how many times faster the second is.

    `runtime`: the software that served them, with its release; empty where Billhook ran them with transformers.
    `predicted`: the same ratio by the weights that each token meets, alone. `energy`: the counters that were read; None
    of a report of an earlier Billhook.
    """

    kind: ClassVar[str] = "speed"

    models: tuple[ModelRates, ...]
    protocol: TimingProtocol
    environment: Environment
    ratio: SpeedRatio | None = None
    runtime: str = ""
    predicted: PredictedSpeed | None = None
    energy: EnergyCounters | None = None

    def rows(self) -> list[JsonObject]:
        """A row a model."""
        return [
            {"model": each.model, **estimate_columns("prefill_tokens_per_s", each.rates.prefill_tokens_per_s),
             **estimate_columns("decode_tokens_per_s", each.rates.decode_tokens_per_s),
             **estimate_columns("prefill_joules", each.rates.prefill_joules),
             **estimate_columns("decode_joules", each.rates.decode_joules),
             "peak_bytes": each.rates.peak_bytes, "kv_bytes": each.kv_bytes}
            for each in self.models
        ]  # fmt: skip
