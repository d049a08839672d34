"""How much worse is still good enough: `3%ppl` or `1pp:FILE`, and whether a student stays within that."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from billhook.core.errors import UsageError
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.statistics import paired_difference, zero_difference

CONFIDENCE = 0.95  # one-sided
BOUND = f"one-sided {CONFIDENCE:.0%}"  # the label of such an end, wherever one is shown


def parse_amount(text: str, unit: Literal["pp", "%"]) -> float:
    """`1pp` or `3%` as a number. Raises UsageError with the spelling."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(pp|%)?\s*", text)
    if match is None or match[2] not in (None, unit) or (unit == "pp" and float(match[1]) > 100):
        what = "percentage points of accuracy: --margin 1pp" if unit == "pp" else "perplexity: --ppl-margin 3%"
        raise UsageError(f"{text!r} is not a margin of {what}.")
    return float(match[1])


@dataclass(frozen=True, slots=True)
class Margin:
    """`amount` percent of the teacher's perplexity, or that many percentage points of its accuracy on a task `file`."""

    amount: Fraction
    kind: Literal["ppl", "pp"]
    file: str | None = None

    @staticmethod
    def parse(text: str) -> Margin:
        """`3%ppl`: perplexity at most 3% higher. `1pp:FILE`: at most one point of accuracy lower on a task file.

        Raises UsageError with the two spellings.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)\s*ppl|pp:(.+?))\s*", text)
        if not match:
            raise UsageError(
                f"{text!r} is not a margin. Write 3%ppl for a perplexity at most 3% higher, or 1pp:FILE for an "
                "accuracy at most one percentage point lower on the multiple-choice task in FILE."
            )
        amount = Fraction(match[1])
        if match[2]:
            return Margin(amount, "ppl")
        if amount > 100:
            raise UsageError(f"{text!r} allows more than 100 percentage points. Write for example 1pp:{match[3]}.")
        return Margin(amount, "pp", match[3])

    def __str__(self) -> str:
        number = f"{float(self.amount):.12g}"
        return f"{number}%ppl" if self.kind == "ppl" else f"{number}pp:{self.file}"

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
