"""What comparisons of models find: verdicts, gates, baselines, and scores on tasks. Plain values; no sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from billhook.core.anatomy import ModelSizes
from billhook.core.margin import Margin, Margins
from billhook.core.plan import Plan
from billhook.core.results.json_form import JsonObject, PagedResult, Result, decode, encode
from billhook.core.results.measured import Environment, Estimate, TokenSetInfo, estimate_columns
from billhook.core.results.monitoring import ServedBaseline

Verdict = Literal["better", "equivalent", "worse", "undecided"]

GateVerdict = Literal["FAIL", "UNDECIDED", "PASS"]
GATE_VERDICTS: tuple[GateVerdict, ...] = ("FAIL", "UNDECIDED", "PASS")  # the worst of all sets is that of the whole

SetKind = Literal["text", "choices", "written", "harness"]


@dataclass(frozen=True, slots=True)
class EvalSetInfo:
    """An evaluation set: where it comes from, and its tokens, which of a task of lm-evaluation-harness it alone knows.

    `shots`: solved items before each item of a task; None for text, and where the harness decides.
    """

    source: str
    kind: SetKind
    shots: int | None = None
    tokens: TokenSetInfo | None = None


@dataclass(frozen=True, slots=True)
class SeenSets:
    """A model, and the sets of which the search or the recovery that made it has seen some documents."""

    model: str
    sets: tuple[str, ...]


# -- compare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """One model of a comparison. `earlier`: what was removed from it, and narrowed, before."""

    model: str
    fingerprint: str
    earlier: Plan
    sizes: ModelSizes


@dataclass(frozen=True, slots=True)
class SetValue:
    """What one model got on a set: perplexity, or the score of the verdicts; `scores`: all of a task, by name."""

    estimate: Estimate
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """One model against the first on a set. `change`, 95%, and `interval90`: nats per token, or a share of the items.

    `p`: that there is no change; `p_holm`: adjusted for all sets. `gained`, `lost`: items that only this model, and
    that only the first has right; None where outcomes are not 0 and 1. `more`: how many more texts or items would
    decide it; None where it is decided, or no number would.
    """

    change: Estimate
    interval90: Estimate
    p: float
    p_holm: float
    gained: int | None
    lost: int | None
    margin: Margin
    verdict: Verdict
    more: int | None


@dataclass(frozen=True, slots=True)
class ItemResponse:
    """What one model made of an item: log-probabilities of its `choices`, or the `answer` that it wrote.

    `values`: nats, of each choice; `characters`: of each, as acc_norm counts them; `gold`: the number of the right one.
    `target`: the right answer to a question.
    """

    number: int
    query: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    values: tuple[float, ...] = ()
    characters: tuple[int, ...] = ()
    target: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Flip:
    """An item that the first and some other model do not answer alike; `right`: which of all models do.

    Of choices: the `choices`, the number of the right one, `gold`, and the `probabilities` that each model gives them.
    Of questions: the `target`, and the `answers` of the models.
    """

    number: int
    query: str
    right: tuple[bool, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None
    probabilities: tuple[tuple[float, ...], ...] = ()
    target: str = ""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ComparedSet:
    """One set: `score`, the evaluation that verdicts are about, over `n` documents or items; `values` of all models.

    `pairs`: of all models but the first; None where the two do not share their items, such as text by two tokenizers.
    """

    info: EvalSetInfo
    score: str
    n: int
    values: tuple[SetValue, ...]
    pairs: tuple[PairVerdict | None, ...]
    flips: tuple[Flip, ...]

    @property
    def source(self) -> str:
        return self.info.source

    @property
    def is_text(self) -> bool:
        """Whether it is measured by perplexity."""
        return self.score == "perplexity"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two models are on a text: `kl` to the first, nats per token; `same`: the share of equal next tokens."""

    kl: Estimate
    same: Estimate
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """Tokens per second of one model, as medians over the repeats, and the peak memory of its process or device."""

    prefill: Estimate
    decode: Estimate
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class SpeedPair:
    """Two models that were timed in turn: the speed of each, and ratios, medians over the pairs of runs.

    Each run reads `batch` prompts of `prompt_tokens`, and decodes `new_tokens`.
    """

    first: ModelSpeed
    other: ModelSpeed
    prefill_ratio: Estimate
    decode_ratio: Estimate
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int


@dataclass(frozen=True, repr=False)
class Comparison(PagedResult):
    """Models held against the first one, set by set; `agreement` and `speed` of each but the first, where known."""

    kind: ClassVar[str] = "compare"

    models: tuple[ComparedModel, ...]
    sets: tuple[ComparedSet, ...]
    margins: Margins
    agreement: tuple[Agreement | None, ...]
    speed: tuple[SpeedPair | None, ...]
    seen: tuple[SeenSets, ...]
    environment: Environment

    def verdicts(self, other: int = 1) -> tuple[Verdict, ...]:
        """What every set says of the model number `other`, where it can be held against the first."""
        return tuple(pair.verdict for each in self.sets if (pair := each.pairs[other - 1]) is not None)

    def rows(self) -> list[JsonObject]:
        """A row for each set and model; the first model has no verdict."""
        return [
            {"set": each.source, "score": each.score, "n": each.n, "model": about.model}
            | estimate_columns("value", value.estimate)
            | _verdict_columns(each.pairs[number - 1] if number else None)
            for each in self.sets
            for number, (about, value) in enumerate(zip(self.models, each.values, strict=True))
        ]


def _verdict_columns(pair: PairVerdict | None) -> JsonObject:
    names = ("p", "p_holm", "gained", "lost", "verdict")
    own = {name: None if pair is None else getattr(pair, name) for name in names}
    return estimate_columns("change", None if pair is None else pair.change) | own


# -- gate -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One set of a gate. `baseline`, `student`: perplexities, or accuracies; `lost`: in percent, or percentage points.

    Each end of `lost` holds with 95% confidence, one-sided.
    """

    source: str
    score: str
    n: int
    verdict: GateVerdict
    baseline: float
    student: float
    lost: Estimate
    margin: Margin

    @property
    def is_text(self) -> bool:
        """Whether it is measured by perplexity."""
        return self.margin.kind == "ppl"


@dataclass(frozen=True, repr=False)
class GateReport(Result):
    """Whether a student loses no more than the margins on every set."""

    kind: ClassVar[str] = "gate"

    verdict: GateVerdict
    student: str
    baseline: str
    checks: tuple[GateCheck, ...]
    seen: tuple[SeenSets, ...]
    environment: Environment

    def __repr__(self) -> str:
        return f"GateReport({self.verdict}: {self.student} against {self.baseline}, {len(self.checks)} checks)"

    def rows(self) -> list[JsonObject]:
        """A row for each check."""
        return [
            {"set": check.source, "score": check.score, "n": check.n, "verdict": check.verdict}
            | {"baseline": check.baseline, "student": check.student, "margin": str(check.margin)}
            | estimate_columns("lost", check.lost)
            for check in self.checks
        ]


# -- baselines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BaselineItems:
    """What a baseline was measured on: sets, and the fields of a recipe that decide which items there are."""

    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    items: int | None
    scores: tuple[str, ...]
    shots: int
    shots_from: str
    field: str
    eval_tokens: int
    eval_length: int
    seed: int

    def text_fields(self) -> JsonObject:
        """The fields of a recipe."""
        return {name: getattr(self, name) for name in BASELINE_TEXT}


BASELINE_TEXT = ("field", "eval_tokens", "eval_length", "seed")
BASELINE_SETS = ("texts", "tasks", "items", "scores", "shots", "shots_from")


@dataclass(frozen=True, slots=True)
class BaselineSet:
    """One set: the score, the hash of its items, and perplexity or accuracy, None where the store does not hold it."""

    source: str
    score: str
    tokens: str
    value: float | None = None


@dataclass(frozen=True, repr=False)
class Baseline(Result):
    """A model that was measured under a name, for gates and watches. `compute`: its dtype and the kind of device.

    `served`: how a server was asked that was measured instead; then `model` is its address, `fingerprint` a digest of
    what it answered.
    """

    kind: ClassVar[str] = "baseline"

    name: str
    model: str
    fingerprint: str
    compute: str
    items: BaselineItems
    sets: tuple[BaselineSet, ...]
    served: ServedBaseline | None = None

    def __repr__(self) -> str:
        return f"Baseline({self.name}: {self.model}, {', '.join(each.source for each in self.sets)})"

    def rows(self) -> list[JsonObject]:
        """A row for each set."""
        own = {"name": self.name, "model": self.model, "fingerprint": self.fingerprint}
        return [own | {"set": each.source, "score": each.score, "value": each.value} for each in self.sets]

    def stored(self) -> JsonObject:
        """The form in which a store caches it, without values. It never changes: old stores hold it."""
        asked = asdict(self.items)
        served = {} if self.served is None else {"served": encode(self.served)}
        return served | {
            "name": self.name, "model": self.model, "fingerprint": self.fingerprint, "compute": self.compute,
            "asked": {name: asked[name] for name in BASELINE_SETS},
            "text": {name: asked[name] for name in BASELINE_TEXT},
            "sets": {each.source: [each.score, each.tokens] for each in self.sets},
        }  # fmt: skip

    @staticmethod
    def from_stored(value: JsonObject) -> Baseline:
        """The baseline that `stored` wrote, in this version or an older one."""
        asked = {name: value["asked"][name] for name in BASELINE_SETS}
        asked |= {name: tuple(asked[name]) for name in ("texts", "tasks", "scores")}
        items = BaselineItems(**asked, **{name: value["text"][name] for name in BASELINE_TEXT})
        sets = tuple(BaselineSet(source, *about) for source, about in value["sets"].items())
        served = decode(ServedBaseline, value["served"]) if "served" in value else None
        return Baseline(value["name"], value["model"], value["fingerprint"], value["compute"], items, sets, served)


# -- eval -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One score of a task: the mean over its items."""

    source: str
    score: str
    estimate: Estimate


@dataclass(frozen=True, repr=False)
class TaskScores(Result):
    """One model on all items of tasks: every score of each."""

    kind: ClassVar[str] = "eval"

    model: str
    fingerprint: str
    scores: tuple[TaskScore, ...]
    sets: tuple[EvalSetInfo, ...]
    seen: tuple[SeenSets, ...]
    environment: Environment

    def rows(self) -> list[JsonObject]:
        """A row for each score."""
        return [
            {"set": each.source, "score": each.score, "n": each.estimate.n, "reliable": each.estimate.reliable}
            | estimate_columns("value", each.estimate)
            for each in self.scores
        ]
