"""Arithmetic: sums, differences and products of small numbers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from billhook.data.choice_tasks import Item
from billhook.data.skills.questions import WRONG, Level, Question, items_of

SHOTS = 4
NEAR = (1, 2, 3, 10, 20)  # what wrong results are off by


def arithmetic(seed: int) -> list[Item]:
    """Return items such as `7 + 8 =`, by their results; wrong ones are near, with as many digits.

    Levels: sums of one digit; sums and differences of two; products of one digit; products of two digits with one.
    """
    makes = (_sum(1, 9), _sum(11, 99), _product((2, 9), (2, 9)), _product((11, 49), (3, 9)))
    return items_of("arithmetic", seed, [Level(make, SHOTS) for make in makes])


def _sum(low: int, high: int) -> Callable[[Random], Question]:
    def ask(draw: Random) -> Question:
        a, b = draw.randint(low, high), draw.randint(low, high)
        if low > 1 and draw.random() < 0.5:
            a, b = max(a, b), min(a, b)
            return _question(draw, f"{a} - {b} =", a - b)
        return _question(draw, f"{a} + {b} =", a + b)

    return ask


def _product(first: tuple[int, int], second: tuple[int, int]) -> Callable[[Random], Question]:
    def ask(draw: Random) -> Question:
        a, b = draw.randint(*first), draw.randint(*second)
        return _question(draw, f"{a} * {b} =", a * b)

    return ask


def _question(draw: Random, text: str, result: int) -> Question:
    """Put any number of the wrong results below the right one, so that its rank tells nothing."""
    lower, higher = ([result + sign * gap for gap in NEAR] for sign in (-1, 1))
    lower, higher = ([x for x in near if x > 0 and len(str(x)) == len(str(result))] for near in (lower, higher))
    below = min(max(draw.randint(0, WRONG), WRONG - len(higher)), len(lower))
    wrong = draw.sample(lower, below) + draw.sample(higher, WRONG - below)
    return Question(text, str(result), tuple(map(str, wrong)))
