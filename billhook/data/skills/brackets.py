"""Brackets: which one closes next, and which closings balance a line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

from billhook.data.choice_tasks import Item
from billhook.data.skills.questions import Level, Question, items_of, wrong_of

CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}
SHOTS = 4


def brackets(seed: int) -> list[Item]:
    """Return items such as `( [ ] { }`, by the bracket that closes, or by all that do.

    Levels: nothing is closed yet; some are, in lines of 5 to 8 brackets; in lines of 13 to 20; all closings in order,
    against other orders of the same ones.
    """
    levels = (Level(_open, SHOTS), Level(_next(5, 8), SHOTS), Level(_next(13, 20), SHOTS), Level(_all, SHOTS))
    return items_of("brackets", seed, levels)


def _open(draw: Random) -> Question:
    opened = draw.choices(list(CLOSES), k=draw.randint(3, 5))
    return _closing(draw, opened, opened)


def _next(shortest: int, longest: int) -> Callable[[Random], Question]:
    def ask(draw: Random) -> Question:
        length = draw.randint(shortest, longest)
        while True:  # until the line ends with a bracket that closes, so that the last one tells nothing
            line, opened = _line(draw, length)
            if opened and line[-1] in CLOSES.values():
                return _closing(draw, line, opened)

    return ask


def _line(draw: Random, length: int) -> tuple[list[str], list[str]]:
    """Return the beginning of a balanced line, and what of it is open, the innermost last."""
    line: list[str] = []
    opened: list[str] = []
    for _ in range(length):
        if opened and draw.random() < 0.45:
            line.append(CLOSES[opened.pop()])
        else:
            opened.append(draw.choice(list(CLOSES)))
            line.append(opened[-1])
    return line, opened


def _closing(draw: Random, line: list[str], opened: list[str]) -> Question:
    right, *rest = [CLOSES[each] for each in reversed(opened)]
    return Question(" ".join(line), right, wrong_of(draw, right, list(CLOSES.values())), " ".join(rest))


def _all(draw: Random) -> Question:
    opened = [*draw.sample(list(CLOSES), 3), draw.choice(list(CLOSES))]
    draw.shuffle(opened)
    right = [CLOSES[each] for each in reversed(opened)]
    orders = [" ".join(order) for order in permutations(right)]
    return Question(" ".join(opened), " ".join(right), wrong_of(draw, " ".join(right), orders))
