"""The result of a pruning: what was removed, what that changed, and how it was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from billhook.core.anatomy import Anatomy, ModelSizes
from billhook.core.margin import WithinReport
from billhook.core.plan import Plan, Site
from billhook.core.results.exports import ExportReport, TargetFit, VocabularyChange
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.measured import (
    Z_95,
    Environment,
    Estimate,
    Step,
    TimingProtocol,
    TokenSetInfo,
    WorkPlan,
    estimate_columns,
)

MOST_P = 0.05  # of a change that is not chance
Phase = Literal["prefill", "decode"]
RunReason = Literal[
    "zeroed", "streamed", "adapter_beside", "calibrated_on_text_alone", "no_answers", "no_speed", "recovery_left_out",
    "no_skills", "loss_alone",
]  # fmt: skip

# -- facts of a model, and of a plan ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The teacher of a run. `dtype` is that of its checkpoint, `compute_dtype` that of the measurements."""

    name: str
    type: str
    fingerprint: str
    blocks: int
    dtype: str
    compute_dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class SizeChange:
    """Counted sizes of both models; the student's with what a repair added."""

    teacher: ModelSizes
    student: ModelSizes


@dataclass(frozen=True, slots=True)
class RunData:
    """The tokens of a run: what a search sees, and what proves its student."""

    calibration: TokenSetInfo
    evaluation: TokenSetInfo


# -- what was measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PerplexityChange:
    """Perplexity of both models on held-out text. `ratio`: student over teacher, in pairs."""

    teacher: float
    student: float
    ratio: Estimate


@dataclass(frozen=True, slots=True)
class TaskChange:
    """Accuracy of both models on a task file. `change`: student minus teacher, in pairs."""

    file: str
    teacher: float
    student: float
    change: Estimate


@dataclass(frozen=True, slots=True)
class SkillChange:
    """What both models get of one skill, on questions with a few choices of which one is right.

    `teacher`, `student`: accuracies; `chance`: that of guessing. `change`: student minus teacher, in pairs; `p`: that
    there is none, adjusted for all skills that the run tests (Holm). `teacher_nats`, `student_nats`: mean of the
    log-probability that the right choice has among the choices; `nats`: its change, in pairs.
    """

    skill: str
    chance: float
    teacher: float
    student: float
    change: Estimate
    p: float
    teacher_nats: float
    student_nats: float
    nats: Estimate

    @property
    def lost(self) -> bool:
        """Whether the student is worse by the interval of its accuracy, and by a test at 5% for all skills together."""
        return self.change.high < 0 and self.p < MOST_P


@dataclass(frozen=True, slots=True)
class RecoveryGain:
    """Perplexity on one text before and after one recovery.

    `ratio`: after over before, in pairs. `closed`: the share of the gap to the teacher; None where there is no gap.
    """

    teacher: float
    before: float
    after: float
    ratio: Estimate
    closed: float | None


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What one recovery learnt from, took and gave. `parameters`: of the repair so far; `on`: by use of the text."""

    recovery: str
    options: JsonObject
    seconds: float
    parameters: int
    tokens: int
    data: str
    on: dict[str, RecoveryGain]


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second, medians with intervals. `peak_bytes`: of a process that loads the model and answers.

    `eager_decode_tokens_per_s`: kernel by kernel, where decoding was timed as a replayed graph of kernels.
    `prefill_joules`, `decode_joules`: per token, means with intervals; None where the machine has no counter.
    """

    prefill_tokens_per_s: Estimate
    decode_tokens_per_s: Estimate
    peak_bytes: int | None
    eager_decode_tokens_per_s: Estimate | None = None
    prefill_joules: Estimate | None = None
    decode_joules: Estimate | None = None


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """How many times faster the second model is, from pairs that ran one after the other.

    `decode_joules`: how many times the energy per decoded token it takes; None where nothing counts that.
    """

    prefill: Estimate
    decode: Estimate
    decode_joules: Estimate | None = None


@dataclass(frozen=True, slots=True)
class PredictedSpeed:
    """The same ratio as the sizes promise it."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class SpeedGap:
    """Why measured and predicted speed differ: the time of a decoding step of the teacher, and of reading weights."""

    phases: tuple[Phase, ...]  # in which they do
    batch: int
    step_seconds: float
    read_seconds: float


@dataclass(frozen=True, slots=True)
class SpeedChange:
    """Speed of both models, timed in turn. `gap`: None where the prediction holds."""

    teacher: Rates
    student: Rates
    ratio: SpeedRatio
    predicted: PredictedSpeed
    protocol: TimingProtocol
    gap: SpeedGap | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What both models make of one prompt."""

    prompt: str
    teacher: str
    student: str


# -- how the plan was found ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decided:
    """How many candidates were measured in full, dropped by a bound, dropped by a test, and not measured."""

    full: int = 0
    bound: int = 0
    raced: int = 0
    skipped: int = 0

    @property
    def total(self) -> int:
        return self.full + self.bound + self.raced + self.skipped


@dataclass(frozen=True, slots=True)
class SiteLoss:
    """What a search measured of a student that lacks one site alone: the loss, and its standard error over documents.

    `tokens`: of the calibration, on which it was measured. `at_least`: the search dropped it as soon as it was certain
    to lose, and `loss` is a lower bound.
    """

    site: Site
    loss: float
    se: float | None
    tokens: int
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class AuditedRound:
    """One round measured again, exactly. `regret`: loss of the chosen candidate minus that of the best, per token."""

    chosen: Plan
    best: Plan
    regret: float
    regret_se: float | None


@dataclass(frozen=True, slots=True)
class FinalChoice:
    """The last choice of a search: the lowest of its best `plans`, on text that no round had seen.

    Losses per token: of the plan that was taken, on the `calibration` text and on the `unseen` one; `before`: on the
    unseen one, of the plan that the calibration text alone chooses; `gap`: how much lower the plan that was taken is,
    with its standard error over documents. `elsewhere`: the plan was found for another size.
    """

    plans: int
    calibration: float
    unseen: float
    before: float
    gap: float
    gap_se: float | None
    elsewhere: bool
    data: TokenSetInfo

    @property
    def optimism(self) -> float:
        """How much lower the loss on the calibration text is."""
        return self.unseen - self.calibration


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a plan takes of `site`, against taking more of `other` instead, on text that no round has seen.

    `gap`: how much higher the loss per token is then, with its standard error over documents; below 0, that text would
    have made the choice otherwise.
    """

    site: Site
    other: Site
    gap: float
    gap_se: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the gap is more than noise, by its 95% interval."""
        return self.gap_se is not None and abs(self.gap) > Z_95 * self.gap_se


@dataclass(frozen=True, slots=True)
class Influence:
    """How much a plan owes to its calibration text: each of its choices against the best other one, on `data`."""

    exchanges: tuple[Exchange, ...]
    data: TokenSetInfo


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """How a search went. `audit`: None where not asked for; `final`, `influence`: where no other text judged it.

    `site_evaluations`: sites computed, over all tokens; of a run that was resumed, by the attempt that ended it.
    """

    mode: Literal["exact", "fast"]
    decided: Decided
    work: WorkPlan
    site_evaluations: float
    audit: tuple[AuditedRound, ...] | None = None
    final: FinalChoice | None = None
    influence: Influence | None = None


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class RunResult(Result):
    """What a pruning removed, what that changed, and how it was found.

    `checkpoint`: the student's `model_type`; `reasons`: what a reader of the numbers must know; `recipe`: what was
    asked; `seen`: digests of the documents and items that a search, a recovery or an earlier pruning has looked at.
    `targets`: which software that serves models takes the student, through which export; `exports`: those that stand
    beside the checkpoint. `changed`: the fields of the recipe that are not at their defaults; empty in reports that
    do not say. `alone`: what removing each site alone costs, as far as the search measured it. `skills`: those that
    were tested. `vocabulary`: what was cut of it before. Then `sizes`, `tasks`, `skills`, `speed` and `answers` compare
    with the `model` as it was given, and `anatomy` and `steps` are of the smaller one. `perplexity` is None then:
    perplexities of other tokens do not compare, and bits per byte do.
    """

    kind: ClassVar[str] = "prune"

    billhook: str
    run: str
    created: str
    out: str
    checkpoint: str
    reasons: tuple[RunReason, ...]
    model: ModelInfo
    anatomy: Anatomy
    already_removed: Plan
    recipe: JsonObject
    environment: Environment
    loss: str
    loss_unit: str
    plan: Plan
    data: RunData
    seen: tuple[str, ...]
    steps: tuple[Step, ...]
    search: SearchSummary
    within: WithinReport | None
    perplexity: PerplexityChange | None
    tasks: tuple[TaskChange, ...]
    sizes: SizeChange
    recoveries: tuple[RecoveryReport, ...]
    speed: SpeedChange | None
    answers: tuple[Answer, ...]
    seconds: dict[str, float]
    targets: tuple[TargetFit, ...] = ()
    exports: tuple[ExportReport, ...] = ()
    changed: tuple[str, ...] = ()
    alone: tuple[SiteLoss, ...] = ()
    skills: tuple[SkillChange, ...] = ()
    vocabulary: VocabularyChange | None = None

    def rows(self) -> list[JsonObject]:
        """One row, so that the rows of several runs make a table."""
        quality, speed = self.perplexity, self.speed
        row: JsonObject = {
            "run": self.run, "model": self.model.name, "out": self.out, "removed": len(self.plan.removed),
            "narrowed": len(self.plan.narrowed), "plan": str(self.plan),
        }  # fmt: skip
        for side, sizes in (("teacher", self.sizes.teacher), ("student", self.sizes.student)):
            row |= {f"{name}_{side}": size for name, size in asdict(sizes).items()}
        before, after = (quality.teacher, quality.student) if quality else (None, None)
        row |= {"perplexity_teacher": before, "perplexity_student": after}
        row |= estimate_columns("perplexity_ratio", quality.ratio if quality else None)
        if (cut := self.vocabulary) is not None:
            row |= {"rows_teacher": cut.rows_before, "rows_student": cut.rows_after}
            row |= estimate_columns("more_tokens", cut.text.more) | {"bits_per_byte_teacher": cut.text.before.value}
            row |= {"bits_per_byte_student": cut.text.after.value}
            row |= estimate_columns("bits_per_byte_change", cut.text.change)
        for task in self.tasks:
            row |= {f"{task.file}_teacher": task.teacher, f"{task.file}_student": task.student}
            row |= estimate_columns(f"{task.file}_change", task.change)
        for each in self.skills:
            row |= {f"{each.skill}_teacher": each.teacher, f"{each.skill}_student": each.student}
            row |= estimate_columns(f"{each.skill}_change", each.change)
            row |= estimate_columns(f"{each.skill}_nats", each.nats)
        row |= estimate_columns("prefill_ratio", speed.ratio.prefill if speed else None)
        row |= estimate_columns("decode_ratio", speed.ratio.decode if speed else None)
        return [row | {"seconds": sum(self.seconds.values())}]

    def __repr__(self) -> str:
        removed = f"{len(self.plan.removed)} of {len(self.anatomy.sites)} sites removed"
        narrow = f", {len(self.plan.narrowed)} narrowed" if self.plan.narrowed else ""
        quality = f", perplexity ×{self.perplexity.ratio.value:.3g}" if self.perplexity else ""
        if (cut := self.vocabulary) is not None:
            narrow += f", {cut.rows_before - cut.rows_after:,} of {cut.rows_before:,} rows of the vocabulary"
            quality = f", bits per byte {cut.text.change.value:+.3g}"
        return f"RunResult({self.run} of {self.model.name}: {removed}{narrow}{quality})"
