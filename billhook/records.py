"""What is written down: losses, evaluations, timings, steps, the environment. Plain values that survive JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from billhook.plan import KeptGroups, Plan, Site

LOSS_UNITS = {"angular": "radians", "norm": "logits"}  # of losses that are not in nats


@dataclass(frozen=True, slots=True)
class Loss:
    """How far one plan's outputs are from the teacher's or from the data. Lower is better; nats per token.

    Some are in other units: `LOSS_UNITS`. `sums[d]` is the sum over the counted tokens of document d, `counts[d]` their
    number; of a task a document is an item, and counts once. `bound=True`: a lower bound or an estimate, never stored
    as a loss.
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
class Interval:
    """An estimate with its 95% interval. `reliable=False` where it rests on too few clusters; `note` says so."""

    value: float
    low: float
    high: float
    n: int  # items
    clusters: int
    reliable: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One removal on the way: what went, the loss after it, and the gap to the second best (nats per token)."""

    sites: tuple[Site, ...]
    loss: float
    gap: float | None
    gap_se: float | None  # standard error of the gap over documents
    narrowed: tuple[KeptGroups, ...] = ()  # sites that became narrower, as they are now

    def to_json(self) -> dict[str, object]:
        return {
            "sites": [str(s) for s in self.sites], "narrowed": [str(narrow) for narrow in self.narrowed],
            "loss": self.loss, "gap": self.gap, "gap_se": self.gap_se,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs of one model, taken in turn with another one; `batch` sequences at a time."""

    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    prompt_tokens: int
    new_tokens: int
    batch: int
    peak_bytes: int | None  # of the whole process that loads the model and answers, or of the device


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


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one stage: `done` of `total` units; `note` is what is known so far."""

    stage: str
    done: int = 0
    total: int | None = None
    note: str = ""


EventListener = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """A watcher that looks away."""


def scaled_events(watch: EventListener, before: int, total: int) -> EventListener:
    """What watches one part of a whole of `total`, of which `before` is done."""
    return lambda event: watch(replace(event, done=before + event.done, total=total))


Cost = Callable[[frozenset[Site]], object]
Round = tuple[tuple[Plan, ...], list[Loss]]  # the plans of one Ask and their losses


def removal_trace(path: list[Plan], rounds: list[Round], on_path: list[Loss], cost: Cost = len) -> list[Step]:
    """The path of a search as removals, each with its loss and the gap to the plan that came second.

    Rivals are worth the same (`cost`): a gap between a small and a large site says nothing about noise. The rivals of
    a step are the plans measured in the same round that extend the same predecessor; where a ranking of
    single removals decided (one-shot), they are the single removals that were still to come.
    """
    told: list[Step] = []
    previous = Plan()
    for plan, loss in zip(path, on_path, strict=True):
        gap, error = _gap(previous, plan, rounds, cost)
        went = tuple(sorted(plan.removed - previous.removed)), tuple(sorted(plan.narrowed - previous.narrowed))
        told.append(Step(went[0], loss.mean, gap, error, went[1]))
        previous = plan
    return told


def _gap(previous: Plan, plan: Plan, rounds: list[Round], cost: Cost) -> tuple[float | None, float | None]:
    move = plan.removed - previous.removed
    for start in (previous, Plan()):
        chosen = start.without(*move)
        for plans, losses in reversed(rounds):
            full = {p: loss for p, loss in zip(plans, losses, strict=True) if not loss.bound}
            rivals = [
                loss
                for p, loss in full.items()
                if p.removed > start.removed
                and not (p.removed - start.removed) & plan.removed
                and cost(p.removed - start.removed) == cost(move)
            ]
            if chosen in full:
                return paired_gap(min(rivals, key=lambda loss: loss.mean), full[chosen]) if rivals else (None, None)
    return None, None


def paired_gap(a: Loss, b: Loss) -> tuple[float, float | None]:
    """Mean of a - b in nats per token, paired by document, and its standard error (None for one document)."""
    total = sum(a.counts)
    gap = (math.fsum(a.sums) - math.fsum(b.sums)) / total
    return gap, _ratio_se([x - y - gap * c for x, y, c in zip(a.sums, b.sums, a.counts, strict=True)], total)


def _ratio_se(residuals: Sequence[float], total: float) -> float | None:
    """Standard error of a ratio of sums over documents, from the residuals around the mean; None for one document."""
    n = len(residuals)
    return math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / total if n > 1 else None
