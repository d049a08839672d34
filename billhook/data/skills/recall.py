"""Recall: facts about persons come first, other text follows, and one of the facts is asked."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from billhook.data.choice_tasks import Item
from billhook.data.skills.questions import WRONG, Level, Question, items_of, wrong_of
from billhook.data.skills.words import NAMES, NOUNS, THINGS, filler

PER_LEVEL = 16  # the questions are long


def recall(seed: int) -> list[Item]:
    """Return items such as `The password of Anna is`, by words of which each was told of one person.

    Levels: 4 facts, and 4 sentences after them; 8 facts and 8; 8 facts of two kinds about 4 persons and 8; 12 about 6
    and 16.
    """
    levels = (_told(4, 1, 4), _told(8, 1, 8), _told(4, 2, 8), _told(6, 2, 16))
    return items_of("recall", seed, [Level(ask) for ask in levels], count=PER_LEVEL)


def _told(persons: int, kinds: int, sentences: int) -> Callable[[Random], Question]:
    def ask(draw: Random) -> Question:
        about = [(thing, name) for name in draw.sample(NAMES, persons) for thing in draw.sample(THINGS, kinds)]
        if kinds == 1:
            about = [(about[0][0], name) for _, name in about]
        draw.shuffle(about)
        facts = dict(zip(about, draw.sample(NOUNS, len(about)), strict=True))
        told = " ".join(f"The {thing} of {name} is {word}." for (thing, name), word in facts.items())
        thing, name = draw.choice(about)
        text = f"{told} {filler(draw, sentences)}".rstrip()
        right = facts[thing, name]
        rivals = [word for (_, who), word in facts.items() if who == name and word != right]
        others = [word for word in facts.values() if word not in (right, *rivals)]
        wrong = (*rivals, *wrong_of(draw, right, others))[:WRONG]
        return Question(f"{text}\nThe {thing} of {name} is", right, wrong)

    return ask
