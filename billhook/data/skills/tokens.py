"""Questions of skills as token sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from billhook.core.errors import DataError
from billhook.data.choice_tasks import Item, choice_tokens, encode_items, item_rows
from billhook.data.skills import SKILLS, TASK, SkillName, parse_skills
from billhook.data.skills.arithmetic import arithmetic
from billhook.data.skills.brackets import brackets
from billhook.data.skills.copying import copying
from billhook.data.skills.recall import recall
from billhook.data.token_sets import TokenSet, special_prefix
from billhook.models.load import Teacher

ITEMS: Mapping[SkillName, Callable[[int], list[Item]]] = {
    "arithmetic": arithmetic, "brackets": brackets, "copying": copying, "recall": recall,
}  # fmt: skip
assert tuple(ITEMS) == SKILLS
FEWEST = 10  # items on which a skill is tested


def skill_tokens(
    name: SkillName, tokenizer: Any, *, positions: int | None, seed: int = 0, limit: int | None = None
) -> TokenSet | None:  # fmt: skip
    """Return the items of a skill, or `limit` drawn from them, as a token set; None where fewer than 10 can be asked.

    Left out are items that are longer than `positions`, and those of which the tokenizer writes two choices alike.
    """
    items, prefix, kept = ITEMS[name](seed), special_prefix(tokenizer), []
    encoded = encode_items([(item, "") for item in items], tokenizer)
    for item in items:
        rows = item_rows(item, "", encoded, tokenizer, prefix, positions=None, source=TASK + name)
        fits = positions is None or max(len(row.ids) for row in rows) <= positions
        if fits and len({row.ids for row in rows}) == len(rows):
            kept.append((item, rows))
    if len(kept) < FEWEST:
        return None
    if limit is not None and limit < len(kept):
        kept = [kept[i] for i in sorted(Random(seed).sample(range(len(kept)), limit))]
    return choice_tokens(kept, [item.number for item, _ in kept], TASK + name)


def load_skill(task: str, teacher: Teacher, *, items: int | None = None, seed: int = 0) -> tuple[TokenSet, list[Item]]:
    """Return the token set of a skill by its name as a task, and all its items. Raises DataError for too few."""
    (skill,) = parse_skills(task.removeprefix(TASK))
    positions = getattr(teacher.model.config, "max_position_embeddings", None)
    tokens = skill_tokens(skill, teacher.tokenizer, positions=positions, seed=seed, limit=items)
    if tokens is None:
        raise DataError(
            f"{teacher.name} cannot be asked {task}: its tokenizer writes the choices alike, or it has too few "
            "positions. Leave the task out."
        )
    return tokens, ITEMS[skill](seed)
