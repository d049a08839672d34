"""Margins, how much a student may lose: `3%ppl`, `1pp` or `1pp:FILE`, and the check of one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from billhook.core.errors import UsageError
from billhook.core.results.measured import Estimate, EvalResult, TokenSetInfo

CONFIDENCE = 0.95  # one-sided
BOUND = f"one-sided {CONFIDENCE:.0%}"  # the label of such an end

PERPLEXITY_SPELLING = "3%ppl for a perplexity at most 3% higher"
FILE_SPELLING = "1pp:FILE for an accuracy at most one percentage point lower on the multiple-choice task in FILE"
ANY_SPELLING = "1pp for an accuracy at most one percentage point lower on every task, 1pp:FILE for one task alone"


@dataclass(frozen=True, slots=True)
class Margin:
    """The allowed loss: `amount` percent of a perplexity (`ppl`), or percentage points of an accuracy (`pp`).

    `file`: the task of the accuracy; None: all tasks.
    """

    amount: Fraction
    kind: Literal["ppl", "pp"]
    file: str | None = None

    @staticmethod
    def parse(text: str, *, any_task: bool = False) -> Margin:
        """Parse `3%ppl`, `1pp:FILE` and, with `any_task`, `1pp`. Raises UsageError with the allowed spellings."""
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?:(%)\s*ppl|pp(?::(.+?))?)\s*", text)
        if match is None or not (any_task or match[2] or match[3]):
            points = ANY_SPELLING if any_task else FILE_SPELLING
            raise UsageError(f"{text!r} is not a margin. Write {PERPLEXITY_SPELLING}, or {points}.")
        amount = Fraction(match[1])
        if match[2]:
            return Margin(amount, "ppl")
        if amount > 100:
            better = "1pp" if match[3] is None else f"1pp:{match[3]}"
            raise UsageError(f"{text!r} allows more than 100 percentage points. Write for example {better}.")
        return Margin(amount, "pp", match[3])

    def __str__(self) -> str:
        number = f"{float(self.amount):.12g}"
        return f"{number}%ppl" if self.kind == "ppl" else f"{number}pp" + (f":{self.file}" if self.file else "")

    def to_json(self) -> str:
        return str(self)

    @staticmethod
    def from_json(value: str) -> Margin:
        return Margin.parse(value, any_task=True)

    @property
    def limit(self) -> float:
        """The largest allowed loss: nats per token, or a share of the items."""
        return math.log1p(float(self.amount) / 100) if self.kind == "ppl" else float(self.amount) / 100

    def check(self, teacher: EvalResult, student: EvalResult, seed: int = 0, *, same: bool = False) -> MarginCheck:
        """Check whether the student is within the margin on these items, with 95% confidence.

        `teacher`, `student`: negative log-likelihoods for `ppl`, outcomes of 0 and 1 for `pp`, of the same items;
        `same`: the student is the teacher, and loses nothing.
        """
        from billhook.core.statistics import paired_difference, zero_difference  # numpy, which parsing needs not

        pair = (teacher, student) if self.kind == "ppl" else (student, teacher)  # so that a loss is positive
        two_sided = 2 * CONFIDENCE - 1
        loss = zero_difference(teacher) if same else paired_difference(*pair, seed, level=two_sided)
        return MarginCheck(loss, loss.high <= self.limit)


@dataclass(frozen=True, slots=True)
class MarginCheck:
    """A student's loss, with an interval whose upper end holds with 95% confidence, and whether it is within."""

    lost: Estimate
    within: bool

    def in_units(self, kind: str) -> Estimate:
        """Return the loss in percent of perplexity, or in percentage points."""
        ends = (self.lost.low, self.lost.value, self.lost.high)
        low, value, high = (100 * (math.expm1(min(x, 700.0)) if kind == "ppl" else x) for x in ends)
        return replace(self.lost, value=value, low=low, high=high)


@dataclass(frozen=True, slots=True)
class Margins:
    """Margins of all kinds of sets: perplexity, accuracy on tasks, and accuracy on single tasks."""

    perplexity: Margin = Margin(Fraction(3), "ppl")
    accuracy: Margin = Margin(Fraction(1), "pp")
    files: tuple[Margin, ...] = ()

    @staticmethod
    def parse(texts: str | Sequence[str] = ()) -> Margins:
        """Parse margins; a kind of set without one has the default, 3%ppl or 1pp.

        Raises UsageError for malformed margins, and for two of one kind or one file.
        """
        parsed = [Margin.parse(text, any_task=True) for text in ((texts,) if isinstance(texts, str) else texts)]
        by_set: dict[tuple[str, str | None], Margin] = {}
        for margin in parsed:
            first = by_set.setdefault((margin.kind, margin.file), margin)
            if first is not margin:
                what = "perplexity" if margin.kind == "ppl" else f"accuracy on {margin.file or 'every task'}"
                raise UsageError(f"{first} and {margin} are both margins of {what}. Leave one of them out.")
        default = Margins()
        perplexity = by_set.get(("ppl", None), default.perplexity)
        accuracy = by_set.get(("pp", None), default.accuracy)
        return Margins(perplexity, accuracy, tuple(margin for margin in parsed if margin.file is not None))

    def on(self, source: str, score: str) -> Margin:
        """Return the margin of one score of one set; `score`: the name of an evaluation."""
        from billhook.core.statistics import LOSS_EVALUATIONS

        if score in LOSS_EVALUATIONS:
            return self.perplexity
        return next((margin for margin in self.files if margin.file == source), self.accuracy)


@dataclass(frozen=True, slots=True)
class MarginTrial:
    """One size that was tried for a margin. `lost`: percent of perplexity, or percentage points of accuracy."""

    percent: float  # of the parameters that it removes
    within: bool
    lost: Estimate


@dataclass(frozen=True, slots=True)
class WithinReport:
    """What a margin said of each trial, judged on `data`."""

    margin: Margin
    trials: tuple[MarginTrial, ...]
    data: TokenSetInfo

    @property
    def taken(self) -> MarginTrial:
        """The largest trial within the margin."""
        return max((trial for trial in self.trials if trial.within), key=lambda trial: trial.percent)
