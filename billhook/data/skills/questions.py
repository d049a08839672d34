"""What every skill shares: a question with one right answer, and questions of one difficulty as items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from billhook.data.choice_tasks import Item

WRONG = 3  # choices of a question
ITEMS_PER_LEVEL = 25


@dataclass(frozen=True, slots=True)
class Question:
    """A text, what continues it, and three continuations that are wrong. One blank stands before each.

    `rest`: what follows the right one where the question is shown solved.
    """

    text: str
    right: str
    wrong: tuple[str, ...]
    rest: str = ""

    @property
    def solved(self) -> str:
        """The whole line."""
        return " ".join(filter(None, (self.text, self.right, self.rest)))


@dataclass(frozen=True, slots=True)
class Level:
    """One difficulty: how a question is drawn, and how many solved ones stand before each item, a line each."""

    ask: Callable[[Random], Question]
    shots: int = 0


def items_of(name: str, seed: int, levels: Sequence[Level], count: int = ITEMS_PER_LEVEL) -> list[Item]:
    """Return `count` items of every level, easiest first, no two of which are equal.

    The solved questions of a level are the same for all its items and are none of them.
    """
    draw = Random(f"{name} {seed}")
    items: list[Item] = []
    for level in levels:
        asked: dict[str, Question] = {}
        while len(asked) < level.shots + count:
            question = level.ask(draw)
            asked.setdefault(question.text, question)
        questions = list(asked.values())
        solved = "".join(f"{each.solved}\n" for each in questions[: level.shots])
        for question in questions[level.shots :]:
            choices = [question.right, *question.wrong]
            draw.shuffle(choices)
            items.append(Item(len(items) + 1, solved + question.text, tuple(choices), choices.index(question.right)))
    return items


def wrong_of(draw: Random, right: str, others: Sequence[str]) -> tuple[str, ...]:
    """Return three of `others` that are not the right answer."""
    return tuple(draw.sample([each for each in dict.fromkeys(others) if each != right], WRONG))
