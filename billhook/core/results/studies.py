"""What studies find: sweeps, transfers, stability and thresholds, as frozen values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from billhook.core.anatomy import ModelSizes
from billhook.core.margin import Margin
from billhook.core.plan import PARTS, Part, Plan
from billhook.core.results.json_form import PagedResult, Row
from billhook.core.results.measured import Environment, Estimate, TokenSetInfo, estimate_columns

SizeName = Literal["parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token"]
SIZE_NAMES: tuple[SizeName, ...] = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token")

# -- trials: what sweeps and transfers are made of ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model got on one evaluation set: its perplexity on a text, or its accuracy on a task.

    `nats`: the mean negative log-likelihood per token of a text; None of a task.
    """

    kind: Literal["perplexity", "accuracy"]
    estimate: Estimate
    nats: float | None


@dataclass(frozen=True, slots=True)
class StudentOutcome(Outcome):
    """What a student got on one evaluation set, and its paired differences: nats per token, or shares of the items.

    - `change`: to the teacher.
    - `above_best`: of a sweep, to the lowest loss of the same size and calibration text; 0 with both ends of the best.
    - `above_first_text`: of a sweep, to the same recipe and size on the first calibration text; None on that text.
    - `against_text`: of a transfer, to the student that was pruned on text.
    """

    change: Estimate
    above_best: Estimate | None = None
    above_first_text: Estimate | None = None
    against_text: Estimate | None = None


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One recipe at one size on one calibration text: its plan, what finding it cost, and what the student got.

    - `recipe`: of a transfer, the task that the student was pruned for; `text` for the loss of the recipe on text.
    - `resumed`: an earlier attempt was interrupted; its seconds and site evaluations are not counted.
    - `results`: by evaluation set.
    - `front`: the sizes by which no other trial on the same calibration text is both as small and as good.
    """

    recipe: str
    remove: str
    data: str
    plan: Plan
    sizes: ModelSizes
    search_seconds: float
    site_evaluations: float
    resumed: bool
    results: dict[str, StudentOutcome]
    front: tuple[SizeName, ...] = ()

    def count(self, part: Part) -> int:
        """How many sites of a part are removed whole."""
        return sum(site.part == part for site in self.plan.removed)

    def columns(self) -> Row:
        """All but the outcomes, as columns of a table."""
        return {
            "recipe": self.recipe, "remove": self.remove, "data": self.data,
            **{part: self.count(part) for part in PARTS}, "narrowed": len(self.plan.narrowed), "plan": str(self.plan),
            **asdict(self.sizes), "search_seconds": self.search_seconds, "site_evaluations": self.site_evaluations,
            "resumed": self.resumed, "front": ",".join(self.front),
        }  # fmt: skip


def _outcome_columns(name: str, outcome: StudentOutcome, gaps: tuple[str, ...]) -> Row:
    row: Row = {"set": name, "kind": outcome.kind, **estimate_columns("value", outcome.estimate)}
    row |= {"nats": outcome.nats, **estimate_columns("change", outcome.change), "reliable": outcome.change.reliable}
    for gap in gaps:
        row |= estimate_columns(gap, getattr(outcome, gap))
    return row


# -- sweep -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RefusedTrial:
    """A recipe that cannot meet a size. `reason`: the message of the error."""

    recipe: str
    remove: str
    data: str
    reason: str


@dataclass(frozen=True, repr=False)
class SweepResult(PagedResult):
    """Recipes at several sizes on several calibration texts, measured on the same evaluation sets.

    - `teacher`, `evaluation`: by evaluation set.
    - `calibration`: one for each text and way to draw from it.
    - `batch`, `context`: sequences at a time and tokens before the timed one, where time was measured.
    """

    kind: ClassVar[str] = "sweep"

    model: str
    fingerprint: str
    teacher: dict[str, Outcome]
    sizes: ModelSizes
    trials: tuple[TrialResult, ...]
    refused: tuple[RefusedTrial, ...]
    calibration: tuple[TokenSetInfo, ...]
    evaluation: dict[str, TokenSetInfo]
    batch: int
    context: int
    environment: Environment

    def rows(self) -> list[Row]:
        """A row for each trial and evaluation set."""
        gaps = ("above_best", "above_first_text")
        return [
            {"model": self.model, **trial.columns(), **_outcome_columns(name, outcome, gaps)}
            for trial in self.trials
            for name, outcome in trial.results.items()
        ]

    def __repr__(self) -> str:
        return f"SweepResult({self.model}: {len(self.trials)} trials on {', '.join(self.teacher)})"


# -- transfer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class TransferResult(PagedResult):
    """Pruned for each task, measured on each. The first trial is pruned by the loss of the recipe on text."""

    kind: ClassVar[str] = "transfer"

    model: str
    fingerprint: str
    remove: str
    teacher: dict[str, Outcome]
    sizes: ModelSizes
    trials: tuple[TrialResult, ...]
    evaluation: dict[str, TokenSetInfo]
    environment: Environment

    def rows(self) -> list[Row]:
        """A row for each task that was pruned for and task that was measured."""
        return [
            {"model": self.model, **trial.columns(), **_outcome_columns(name, outcome, ("against_text",))}
            for trial in self.trials
            for name, outcome in trial.results.items()
        ]

    def __repr__(self) -> str:
        return f"TransferResult({self.model}, {self.remove}: {len(self.trials)} trials on {', '.join(self.teacher)})"


# -- stability ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairSpread:
    """A number of every pair of calibration sets: the mean, the lowest and the highest pair. No interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class StabilitySize:
    """Disjoint calibration sets of one size.

    `rank_correlation`: Spearman's, of the scores of all sites; `overlap`: of what both plans remove or narrow, the
    share of all that either does (Jaccard). `plans`: one for each set.
    """

    tokens: int
    sets: int
    rank_correlation: PairSpread
    overlap: PairSpread
    plans: tuple[Plan, ...]


@dataclass(frozen=True, repr=False)
class StabilityResult(PagedResult):
    """How far scores and plans agree between calibration sets."""

    kind: ClassVar[str] = "stability"

    model: str
    fingerprint: str
    metric: str
    search: str
    remove: str
    data: TokenSetInfo
    sizes: tuple[StabilitySize, ...]
    environment: Environment

    def rows(self) -> list[Row]:
        """A row for each number of tokens."""
        return [
            {
                "model": self.model, "metric": self.metric, "search": self.search, "remove": self.remove,
                "tokens": size.tokens, "sets": size.sets,
                **{f"{name}_{end}": value for name in ("rank_correlation", "overlap")
                   for end, value in asdict(getattr(size, name)).items()},
            }
            for size in self.sizes
        ]  # fmt: skip

    def __repr__(self) -> str:
        tokens = ", ".join(f"{size.tokens:,}" for size in self.sizes)
        return f"StabilityResult({self.model}, {self.metric}: sets of {tokens} tokens)"


# -- threshold ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MarginLoss:
    """What a plan loses under one margin, in its unit: percent of perplexity, or percentage points of accuracy.

    Both ends of `lost` are one-sided bounds. `limit`: the most that may be lost.
    """

    margin: Margin
    lost: Estimate
    limit: float
    within: bool


@dataclass(frozen=True, slots=True)
class ThresholdTrial:
    """The plan after so many steps, on the validation items of every margin. `share`: of the parameters, removed."""

    step: int
    share: float
    within: bool
    losses: tuple[MarginLoss, ...]


@dataclass(frozen=True, slots=True)
class ThresholdData:
    """The items on which a margin is checked: those that choose the plan, and those that prove it."""

    validation: TokenSetInfo
    test: TokenSetInfo


@dataclass(frozen=True, repr=False)
class ThresholdResult(PagedResult):
    """How much of a path of steps stays within every margin.

    - `plan`, `share`: after `step` of the `steps`; 0 steps: nothing stays within the margins.
    - `confirmed`: whether the plan is within all margins on test items too; None where there is no plan.
    - `test`: what the plan loses there, by margin; `trials`: what was tried on validation items, by step.
    - `data`: by margin, as it is written.
    - `shares`: of the parameters, removed after 0, 1, … steps; `losses`: after 1, 2, … steps, in the units of `loss`.
    - `knee`: counted from 0, the step after which the curve of the losses bends most.
    """

    kind: ClassVar[str] = "threshold"

    model: str
    fingerprint: str
    margins: tuple[Margin, ...]
    plan: Plan
    step: int
    steps: int
    share: float
    confirmed: bool | None
    test: tuple[MarginLoss, ...]
    trials: tuple[ThresholdTrial, ...]
    data: dict[str, ThresholdData]
    shares: tuple[float, ...]
    losses: tuple[float, ...]
    loss: str
    knee: int | None
    environment: Environment

    def rows(self) -> list[Row]:
        """A row for each trial and margin on validation items, then one for each margin on test items."""
        tried = [("validation", trial.step, trial.share, each) for trial in self.trials for each in trial.losses]
        return [
            {
                "model": self.model, "items": items, "step": step, "share": share, "margin": str(each.margin),
                **estimate_columns("lost", each.lost), "limit": each.limit, "within": each.within,
                "reliable": each.lost.reliable,
            }
            for items, step, share, each in [*tried, *(("test", self.step, self.share, each) for each in self.test)]
        ]  # fmt: skip

    def __repr__(self) -> str:
        return f"ThresholdResult({self.model}: step {self.step} of {self.steps}, {self.share:.1%} of the parameters)"
