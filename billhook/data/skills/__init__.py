"""Skills that pruning takes first: questions made from a seed, as items of multiple choice. No data is needed.

On the limits of layer pruning (arXiv 2602.01997) finds that arithmetic and brackets do not come back by training where
classification does. Copying and recall are what induction heads do (Olsson et al. 2022, arXiv 2209.11895).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from billhook.core.results.run import SKILLS, SkillName
from billhook.data.choice_tasks import Item, choice_tokens, encode_items, item_rows
from billhook.data.skills.arithmetic import arithmetic
from billhook.data.skills.brackets import brackets
from billhook.data.skills.copying import copying
from billhook.data.skills.recall import recall
from billhook.data.token_sets import TokenSet, special_prefix

ITEMS: Mapping[SkillName, Callable[[int], list[Item]]] = {
    "arithmetic": arithmetic, "brackets": brackets, "copying": copying, "recall": recall,
}  # fmt: skip
assert tuple(ITEMS) == SKILLS
SOURCE = "skill:"  # before the name of a skill, as the source of a token set
FEWEST = 10  # items on which a skill is tested


def skill_tokens(name: SkillName, tokenizer: Any, *, positions: int | None, seed: int = 0) -> TokenSet | None:
    """Return the items of a skill as a token set; None where fewer than 10 are left.

    Left out are items that are longer than `positions`, and those of which the tokenizer writes two choices alike.
    """
    items, prefix, kept = ITEMS[name](seed), special_prefix(tokenizer), []
    encoded = encode_items([(item, "") for item in items], tokenizer)
    for item in items:
        rows = item_rows(item, "", encoded, tokenizer, prefix, positions=None, source=SOURCE + name)
        fits = positions is None or max(len(row.ids) for row in rows) <= positions
        if fits and len({row.ids for row in rows}) == len(rows):
            kept.append((item, rows))
    if len(kept) < FEWEST:
        return None
    return choice_tokens(kept, [item.number for item, _ in kept], SOURCE + name)
