"""Skills that pruning takes first: questions made from a seed, as items of multiple choice. No data is needed.

On the limits of layer pruning (arXiv 2602.01997) finds that arithmetic and brackets do not come back by training where
classification does. Copying and recall are what induction heads do (Olsson et al. 2022, arXiv 2209.11895).

Here are their names, for which no torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from billhook.core.errors import UnknownName
from billhook.core.registry import split_names

SkillName = Literal["arithmetic", "brackets", "copying", "recall"]
SKILLS: tuple[SkillName, ...] = get_args(SkillName)
TASK = "skill:"  # before the name of a skill, where it stands among tasks


def parse_skills(text: str) -> tuple[SkillName, ...]:
    """The skills that `all`, `none`, or names with commas between them mean. Raises UnknownName for another name."""
    names = () if text == "none" else SKILLS if text == "all" else split_names(text)
    if (wrong := next((name for name in names if name not in SKILLS), None)) is not None:
        raise UnknownName("skill", wrong, (*SKILLS, "all", "none"))
    return tuple(skill for skill in SKILLS if skill in names)


def with_skills(tasks: Iterable[str]) -> tuple[str, ...]:
    """Names of tasks, `skill:all` as all skills, each by its name. Raises UnknownName for another skill."""
    named: list[str] = []
    for task in tasks:
        skills = parse_skills(task.removeprefix(TASK)) if task.startswith(TASK) else ()
        named += [TASK + skill for skill in skills] if task.startswith(TASK) else [task]
    return tuple(dict.fromkeys(named))
