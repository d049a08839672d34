"""How much worse is still good enough: `3%ppl`, `1pp` or `1pp:FILE`, and whether a student stays within that."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from billhook.core.errors import UsageError
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.statistics import LOSS_EVALUATIONS, paired_difference, zero_difference

CONFIDENCE = 0.95  # one-sided
BOUND = f"one-sided {CONFIDENCE:.0%}"  # the label of such an end, wherever one is shown

PERPLEXITY_SPELLING = "3%ppl for a perplexity at most 3% higher"
FILE_SPELLING = "1pp:FILE for an accuracy at most one percentage point lower on the multiple-choice task in FILE"
ANY_SPELLING = "1pp for an accuracy at most one percentage point lower on every task, 1pp:FILE for one task alone"


@dataclass(frozen=True, slots=True)
class Margin:
    """What may be lost: `amount` percent of a perplexity (`ppl`), or that many percentage points of an accuracy (`pp`).

    `file`: the task that points are of; None: of every task.
    """

    amount: Fraction
    kind: Literal["ppl", "pp"]
    file: str | None = None

    @staticmethod
    def parse(text: str, *, any_task: bool = False) -> Margin:
        """`3%ppl`, `1pp:FILE` and, with `any_task`, `1pp`. Raises UsageError with the spellings."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)\s*ppl|pp(?::(.+?))?)\s*", text)
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
        """The most that the student may lose: nats per token, or a share of the items."""
        return math.log1p(float(self.amount) / 100) if self.kind == "ppl" else float(self.amount) / 100

    def check(self, teacher: EvalResult, student: EvalResult, seed: int = 0, *, same: bool = False) -> MarginCheck:
        """Whether the student is within the margin on these items, with 95% confidence; the teacher itself is (`same`).

        `teacher`, `student`: negative log-likelihoods for `ppl`, outcomes of 0 and 1 for `pp`, of the same items.
        """
        worse = (teacher, student) if self.kind == "ppl" else (student, teacher)  # what is lost is positive
        both_tails = 2 * CONFIDENCE - 1  # of which one counts
        loss = zero_difference(teacher) if same else paired_difference(*worse, seed, level=both_tails)
        return MarginCheck(loss, loss.high <= self.limit)


@dataclass(frozen=True, slots=True)
class MarginCheck:
    """What a student loses, with an interval whose upper end holds with 95% confidence, and whether that is little."""

    lost: Estimate
    within: bool

    def in_units(self, kind: str) -> Estimate:
        """The loss as people say it: percent of perplexity, or percentage points."""
        ends = (self.lost.low, self.lost.value, self.lost.high)
        low, value, high = (100 * (math.expm1(min(x, 700.0)) if kind == "ppl" else x) for x in ends)
        return replace(self.lost, value=value, low=low, high=high)


@dataclass(frozen=True, slots=True)
class Margins:
    """What may be lost on sets of every kind: perplexity, accuracy on tasks, and accuracy on single tasks."""

    perplexity: Margin = Margin(Fraction(3), "ppl")
    accuracy: Margin = Margin(Fraction(1), "pp")
    files: tuple[Margin, ...] = ()

    @staticmethod
    def parse(texts: str | Sequence[str] = ()) -> Margins:
        """Margins as `Margin.parse` reads them; the defaults, 3%ppl and 1pp, where none is given for a kind of set.

        Raises UsageError for what is no margin, and for two of one kind or one file.
        """
        parsed = [Margin.parse(text, any_task=True) for text in ((texts,) if isinstance(texts, str) else texts)]
        found: dict[tuple[str, str | None], Margin] = {}
        for margin in parsed:
            known = found.setdefault((margin.kind, margin.file), margin)
            if known is not margin:
                what = "perplexity" if margin.kind == "ppl" else f"accuracy on {margin.file or 'every task'}"
                raise UsageError(f"{known} and {margin} are both margins of {what}. Leave one of them out.")
        default = Margins()
        return Margins(
            found.get(("ppl", None), default.perplexity),
            found.get(("pp", None), default.accuracy),
            tuple(margin for margin in parsed if margin.file is not None),
        )

    def on(self, source: str, score: str) -> Margin:
        """The margin of one set and one score of it; `score` is the name of an evaluation."""
        if score in LOSS_EVALUATIONS:
            return self.perplexity
        return next((margin for margin in self.files if margin.file == source), self.accuracy)
