"""What was written of a model that no pruning made: exports and how they run, smaller models, uploads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from billhook.core.options import BasisRule, RankRule
from billhook.core.plan import Site
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.measured import Estimate, estimate_columns


@dataclass(frozen=True, slots=True)
class Verification:
    """How an export and its student differ in the runtime that serves the export, over all next tokens of a text.

    `kl`: from the student's distribution to the runtime's, in nats, the mean over the positions; `worst`: the largest.
    `agreement`: share of positions with the same most likely token. `generated`: tokens of a greedy answer until the
    first that differs, of `of`. `texts`: probe texts that both tokenise alike; None without a tokenizer.
    """

    runtime: str
    version: str
    positions: int
    kl: float
    worst: float
    agreement: float
    generated: int
    of: int
    texts: int | None = None


@dataclass(frozen=True, repr=False)
class ExportReport(Result):
    """An export that stands in a folder. `bytes`: of its files; `verified`: None where no runtime ran it."""

    kind: ClassVar[str] = "export"

    model: str
    to: str
    form: str
    out: str
    files: tuple[str, ...]
    bytes: int
    verified: Verification | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[JsonObject]:
        """A row a file."""
        return [{"file": file} for file in self.files]


@dataclass(frozen=True, slots=True)
class VocabularyText:
    """Held-out text by a model and by the same one with fewer tokens, each with its own tokens.

    `more`: tokens that the smaller vocabulary adds, as a share of those before. `before`, `after`, `change`: bits per
    byte, lower is better; `change` is paired by text. Intervals are over texts.
    """

    source: str
    bytes: int
    tokens_before: int
    tokens_after: int
    more: Estimate
    before: Estimate
    after: Estimate
    change: Estimate


@dataclass(frozen=True, slots=True)
class VocabularyChange:
    """A vocabulary that a run cut before it pruned the rest.

    `counted` tokens of the text `data`, of which `used` are different, chose the rows; `fixed` ones stay whatever is
    removed. `parameters`, `bytes`: of the model with the smaller vocabulary alone. `alone`: the held-out text by the
    model as it was given, and by that one; `text`: by the model as given, and by the student. `by_plan`: bits per byte
    that the plan and its recoveries add, paired by text; None where there is no plan.
    """

    data: str
    counted: int
    used: int
    fixed: int
    rows_before: int
    rows_after: int
    parameters: int
    bytes: int
    alone: VocabularyText
    text: VocabularyText
    by_plan: Estimate | None


@dataclass(frozen=True, repr=False)
class VocabularyReport(Result):
    """A model without a part of its vocabulary, in a folder.

    `counted`: tokens of the text `data`, of which `used` are different. `fixed`: rows that stay whatever is removed.
    `rows`, `parameters`, `bytes` (weights and tokenizer on disk): before and after.
    """

    kind: ClassVar[str] = "vocabulary"

    model: str
    out: str
    data: str
    counted: int
    used: int
    fixed: int
    rows_before: int
    rows_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    texts: tuple[VocabularyText, ...]

    def rows(self) -> list[JsonObject]:
        """A row a held-out text."""
        return [
            {
                "text": text.source, "bytes": text.bytes, "tokens_before": text.tokens_before,
                "tokens_after": text.tokens_after, **estimate_columns("more", text.more),
                **estimate_columns("bits_per_byte_before", text.before),
                **estimate_columns("bits_per_byte_after", text.after), **estimate_columns("change", text.change),
            }
            for text in self.texts
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class FactoredMap:
    """A linear map of a site that is two of a rank. `lost`: share of its output's energy on the calibration text.

    `name`: in its block. `lost` is of the factors as they were fitted, behind the factors before them.
    """

    site: Site
    name: str
    outputs: int
    inputs: int
    rank: int
    lost: float


@dataclass(frozen=True, repr=False)
class FactorReport(Result):
    """A model whose linear maps have low-rank factors, in a folder.

    `tokens` of `data` fitted them; `ranks`: what these were chosen by. `whole`: linear maps of attentions and MLPs that
    stay. `before`, `after`, `change`: negative log-likelihood of the text `held_out` in nats per token, lower is
    better; `change` is paired by text.
    """

    kind: ClassVar[str] = "factor"

    model: str
    out: str
    remove: str
    data: str
    tokens: int
    parameters_before: int
    parameters_after: int
    whole: int
    factors: tuple[FactoredMap, ...]
    held_out: str
    before: Estimate
    after: Estimate
    change: Estimate
    ranks: RankRule = "energy"

    def rows(self) -> list[JsonObject]:
        """A row a linear map that is factors."""
        return [{**asdict(each), "site": str(each.site)} for each in self.factors]


@dataclass(frozen=True, slots=True)
class SliceText:
    """Held-out text by a model and by the same one with a narrower residual stream.

    `before`, `after`: perplexities, lower is better; `ratio`: after over before, paired. Intervals are over texts.
    """

    source: str
    tokens: int
    before: Estimate
    after: Estimate
    ratio: Estimate


@dataclass(frozen=True, repr=False)
class SliceReport(Result):
    """A model with a narrower residual stream, in a folder.

    `asked`: the width as it was asked for; `step`: widths of the type are multiples of it. `energy`: share of the
    squared length of the streams of `calibrated` tokens of `data` that is left, the mean over boundaries, and with one
    basis over tokens; it has no interval. `untied`: whether embedding and head were one and are two now. `parameters`,
    `bytes` (of the weights on disk): before and after. `bases`: one of all boundaries, or one of each, whose streams
    are those that the sliced model has before it.
    """

    kind: ClassVar[str] = "slice"

    model: str
    out: str
    data: str
    calibrated: int
    asked: str
    step: int
    width_before: int
    width_after: int
    energy: float
    untied: bool
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    texts: tuple[SliceText, ...]
    bases: BasisRule = "one"

    def rows(self) -> list[JsonObject]:
        """A row a held-out text."""
        return [
            {
                "text": text.source, "tokens": text.tokens, **estimate_columns("perplexity_before", text.before),
                **estimate_columns("perplexity_after", text.after), **estimate_columns("ratio", text.ratio),
            }
            for text in self.texts
        ]  # fmt: skip


FaultReason = Literal["model", "sites", "widths", "kv_groups", "patches", "biases", "factors"]


@dataclass(frozen=True, slots=True)
class TargetFit:
    """Whether software that serves models takes a student: by the export `export`, or not because of `fault`.

    `fault`: the kind of model, blocks of which a site is missing, widths, a number of KV groups, what a recovery
    added, or factors of weights. `verified`: whether Billhook runs exports in it.
    """

    target: str
    export: str
    fault: FaultReason | None
    verified: bool


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What software that serves models can express of one model; `reason`: why it takes none of it.

    `sites`: whether single sites may be missing (`removed`), are written as `zeros`, or whole blocks alone (`none`).
    `mlps`, `attentions`: widths, `any`, all blocks `alike`, or `none`. `mlp_step`: widths of an mlp without waste are
    multiples of it. `kv_groups`: in how many groups an attention may be left; empty is any number.
    `first_attention`: the first block must keep its attention.
    """

    target: str
    exports: tuple[str, ...]
    verified: bool
    reason: str | None = None
    sites: str = ""
    mlps: str = ""
    attentions: str = ""
    patches: bool = False
    biases: bool = False
    mlp_step: int = 1
    kv_groups: tuple[int, ...] = ()
    first_attention: bool = False


@dataclass(frozen=True, repr=False)
class TargetTable(Result):
    """What every target can express of a model."""

    kind: ClassVar[str] = "targets"

    model: str
    type: str
    targets: tuple[TargetLimits, ...]

    def rows(self) -> list[JsonObject]:
        """A row a target."""
        return [asdict(target) for target in self.targets]


@dataclass(frozen=True, slots=True)
class PushedFile:
    """One file of an upload, by its name in the repository."""

    path: str
    bytes: int


@dataclass(frozen=True, repr=False)
class PushReport(Result):
    """An upload to the Hugging Face Hub: what of a folder goes to a branch of a repository.

    `replaced`, `deleted`: files that were there. `url`: of the commit; empty where nothing was uploaded.
    """

    kind: ClassVar[str] = "push"

    folder: str
    repo: str
    revision: str
    files: tuple[PushedFile, ...]
    replaced: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    created: bool = False
    url: str = ""

    def rows(self) -> list[JsonObject]:
        """A row a file."""
        return [{"file": each.path, "bytes": each.bytes} for each in self.files]
