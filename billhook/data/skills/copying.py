"""Copying: a list of words is repeated, and the next word of it is asked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

from billhook.data.choice_tasks import Item
from billhook.data.skills.questions import WRONG, Level, Question, items_of, wrong_of
from billhook.data.skills.words import NOUNS


def copying(seed: int) -> list[Item]:
    """Return items that repeat a list of words; wrong choices are words of it that come later.

    Levels: 8, 16 and 32 different words; 24 words of which each stands twice, so that one word before is not enough.
    """
    levels = [Level(_repeat(length)) for length in (8, 16, 32)]
    return items_of("copying", seed, [*levels, Level(_twice(12))])


def _repeat(length: int) -> Callable[[Random], Question]:
    def ask(draw: Random) -> Question:
        words = draw.sample(NOUNS, length)
        return _question(draw, words, draw.randint(2, length - 4))

    return ask


def _twice(different: int) -> Callable[[Random], Question]:
    """Lists in which every word is followed by another word each time, and every pair of words stands once."""

    def ask(draw: Random) -> Question:
        words = draw.sample(NOUNS, different)
        while True:
            line = draw.sample(words * 2, 2 * different)
            pairs = set(pairwise(line))
            if len(pairs) == len(line) - 1 and all(a != b for a, b in pairs):
                return _question(draw, line, draw.randint(2, different))

    return ask


def _question(draw: Random, line: list[str], at: int) -> Question:
    """Repeat `line` up to the word number `at`. A word that also follows the one before is among the wrong ones."""
    before, right = line[at - 1], line[at]
    rivals = [b for a, b in pairwise(line) if a == before and b != right]
    later = [word for word in line[at + 1 :] if word not in (right, *rivals)]
    wrong = (*rivals, *wrong_of(draw, right, later))[:WRONG]
    return Question(f"{' '.join(line)}\n{' '.join(line[:at])}", right, wrong)
