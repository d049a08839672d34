"""What narrowed sites need besides weights is held once, within its limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from billhook.core.plan import KeptGroups, Site
from billhook.models import channel_groups, structure
from billhook.models.accelerator.narrowed_parts import NarrowedParts
from billhook.models.load import load


def test_the_least_recently_used_are_dropped_beyond_the_limit(checkpoint: Callable[[str], Path]) -> None:
    teacher = load(checkpoint("llama"), device="cpu", dtype="float32")
    groups = {size.site: size.groups for size in teacher.anatomy.sites}[Site(1, "mlp")]
    narrow = [KeptGroups(Site(1, "mlp"), groups[: len(groups) - away]) for away in range(1, 7)]
    parts = NarrowedParts(teacher)
    parts.bring(narrow)
    limit = sum(parts[each].nbytes for each in narrow[:3])
    assert parts.nbytes == sum(parts[each].nbytes for each in narrow)

    parts = NarrowedParts(teacher, limit)
    first = {each: parts[each] for each in narrow[:3]}
    assert parts.nbytes == limit
    parts.bring([narrow[0], narrow[3]])
    assert parts.nbytes <= limit
    assert parts[narrow[0]] is first[narrow[0]]
    assert parts[narrow[1]] is not first[narrow[1]]
    parts.bring(narrow)  # more than the limit holds: the others are brought when they are asked for
    assert parts.nbytes <= limit + parts[narrow[0]].nbytes

    block = teacher.block(1)
    layout = structure.channel_layout(block, "mlp", teacher.architecture, teacher.model.config)
    for each in narrow:
        kept = channel_groups.kept_positions(layout, groups, each.groups)
        expected = channel_groups.entries_of(block, layout, kept, removed=False)
        found = parts[each].entries
        assert found.keys() == expected.keys()
        assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))
