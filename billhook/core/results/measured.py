"""What is written down: losses, evaluations, timings, steps, the environment. Plain values that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from billhook.core.plan import KeptGroups, Site

Z_95 = 1.96  # standard errors on each side of a mean that a 95% interval takes


@dataclass(frozen=True, slots=True)
class Loss:
    """How far one plan's outputs are from the teacher's or from the data. Lower is better; nats per token.

    Some are in other units, which their decorator states. `sums[d]` is the sum over the counted tokens of document d,
    `counts[d]` their number; of a task a document is an item, and counts once. `bound=True`: a lower bound or an
    estimate, never stored as a loss.
    """

    name: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    bound: bool = False

    @property
    def mean(self) -> float:
        """Per token, over all documents, each weighted by its tokens."""
        return math.fsum(self.sums) / sum(self.counts)

    def per_document(self) -> tuple[float, ...]:
        """Per token, of each document."""
        return tuple(total / count for total, count in zip(self.sums, self.counts, strict=True))


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's estimate for one site or block; higher = removal hurts more.

    `se`: standard error over documents, or over random draws where a metric makes some; `degrees`: of freedom, for the
    interval, where they are few.
    """

    value: float
    se: float | None = None
    degrees: int | None = None

    @staticmethod
    def of(sums: Sequence[float], counts: Sequence[float]) -> Score:
        """The mean per token from sums and token counts of documents."""
        mean = math.fsum(sums) / math.fsum(counts)
        return Score(mean, _ratio_se([s - mean * c for s, c in zip(sums, counts, strict=True)], math.fsum(counts)))


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation of one model: an outcome per item, in a fixed order, so that two runs can be paired.

    For `perplexity` an item is a document: `sums` of negative log-likelihood in nats over `counts` predicted tokens.
    For `acc`, `acc_norm`, `strict_match` and `flexible_match` it is a question: 1 or 0, counted once.
    `clusters[i]` names the text that item i comes from; statistics resample those.
    """

    name: str
    tokens: str  # hash of the token set
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    clusters: tuple[int, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.sums) / sum(self.counts)


@dataclass(frozen=True, slots=True)
class TokenSetInfo:
    """What a token set is made of. `texts` counts the texts that its documents come from; `items` those of a task."""

    source: str
    tokens: int
    sequences: int
    documents: int
    texts: int
    hash: str
    items: int | None = None


Reason = Literal["", "few_texts", "few_items", "one_text", "few_runs"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval, over `n` items that come from `clusters` texts.

    `reliable=False` where it rests on too little, and `reason` says on what: `few_texts`, `few_items` (of a task),
    `few_runs` (of a timing), or `one_text`, whose `clusters` documents were resampled instead. An end that is not known
    is infinite.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    reliable: bool
    reason: Reason = ""

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of a rising `function` of the value, such as exp."""
        return replace(self, value=function(self.value), low=function(self.low), high=function(self.high))


def estimate_columns(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """An estimate as columns of a table: `name`, `name_low` and `name_high`; empty where there is none."""
    ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """One removal on the way: what went, the loss after it, and the gap to the second best (nats per token).

    `gap_se`, `loss_se`: standard errors over documents; None where they are not known.
    """

    sites: tuple[Site, ...]
    loss: float
    gap: float | None
    gap_se: float | None
    narrowed: tuple[KeptGroups, ...] = ()  # sites that became narrower, as they are now
    loss_se: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs of one model, taken in turn with another one; `batch` sequences at a time.

    `eager_decode_s`: of decoding without a graph of kernels, where `decode_s` is with one. `prefill_j`, `decode_j`:
    joules of the same runs, of decoding without a graph; empty where the machine has no counter.
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    batch: int
    peak_bytes: int | None  # of the whole process that loads the model and answers, or of the device
    eager_decode_s: tuple[float, ...] = ()
    prefill_j: tuple[float, ...] = ()
    decode_j: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TimingProtocol:
    """`batch` random prompts of `prompt_tokens`, `new_tokens` decoded greedily with the KV cache, `repeats` times."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 9


@dataclass(frozen=True, slots=True)
class EnergyCounters:
    """The energy counters of a machine by name: those that were read, and those that the user may not read."""

    read: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """How measuring is arranged under a memory budget: in which order, and what is kept between plans."""

    walk: str  # "layers" or "depth-first"
    streamed: bool  # the weights are read from disk block by block
    groups: int  # of documents that are measured together
    checkpoint_every: int  # streams are kept after every so many blocks; 0: after none
    limit: int  # bytes for kept streams
    kept: int  # bytes of them that are expected
    wave: int  # tokens times plans that are measured, and stored, at a time


@dataclass(frozen=True, slots=True)
class Environment:
    """Where a number was measured."""

    billhook: str
    python: str
    torch: str
    transformers: str
    device: str
    machine: str
    threads: int


def loss_se(loss: Loss) -> float | None:
    """The standard error of the mean of a loss over its documents; None for one document."""
    return Score.of(loss.sums, loss.counts).se


def paired_gap(a: Loss, b: Loss) -> tuple[float, float | None]:
    """Mean of a - b in nats per token, paired by document, and its standard error (None for one document)."""
    total = sum(a.counts)
    gap = (math.fsum(a.sums) - math.fsum(b.sums)) / total
    return gap, _ratio_se([x - y - gap * c for x, y, c in zip(a.sums, b.sums, a.counts, strict=True)], total)


def _ratio_se(residuals: Sequence[float], total: float) -> float | None:
    """Standard error of a ratio of sums over documents, from the residuals around the mean; None for one document."""
    n = len(residuals)
    return math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / total if n > 1 else None
