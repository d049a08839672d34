"""The narrowed sites of a run in words."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.core.plan import PARTS, Part, format_ranges
from billhook.core.results.run import RunResult


@dataclass(frozen=True, slots=True)
class NarrowedSites:
    """Narrowed sites of one part that keep equally many channel groups of equally many; `experts`: likewise."""

    part: Part
    blocks: tuple[int, ...]
    kept: int
    had: int
    all_of_part: bool  # that the model has
    unit: str  # what a channel group of them is
    experts: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """`30 MLPs` where it is all of them, `mlp of blocks 4–9, 12` else."""
        if self.all_of_part:
            return f"{len(self.blocks)} {'MLPs' if self.part == 'mlp' else 'attentions'}"
        blocks = format_ranges(self.blocks).replace("-", "–").replace(" ", ", ")
        return f"{self.part} of block{'s' if len(self.blocks) > 1 else ''} {blocks}"

    @property
    def kept_words(self) -> str:
        """`1,229 of 1,536 neurons`, `3 of 4 experts`, `4 experts of 512 of 768 neurons`."""
        (experts, of), each = self.experts, (self.kept // self.experts[0], self.had // self.experts[1])
        words, some = f"{each[0]:,} of {each[1]:,} {self.unit}", f"{experts} of {of} experts".removeprefix(f"{of} of ")
        return words if of == 1 else some if each[0] == each[1] else f"{some} of {words}"

    def __str__(self) -> str:
        return f"{'all ' if self.all_of_part else ''}{self.name}: {self.kept_words}"


def narrowed_sites(result: RunResult) -> list[NarrowedSites]:
    """The narrowed sites, those of one part and equal widths as one, in order of the model."""
    sizes = {size.site: size for size in result.anatomy.sites}
    groups: dict[tuple[Part, int, int, tuple[int, int]], list[int]] = {}
    for kept in sorted(result.plan.narrowed):
        size = sizes[kept.site]
        experts = (sum(map(bool, size.kept_experts(kept.groups))), size.experts)
        key = (kept.site.part, len(kept.groups), len(size.groups), experts)
        groups.setdefault(key, []).append(kept.site.block)
    found = []
    for (part, kept_, had, experts), blocks in groups.items():
        every = {site.block for site in sizes if site.part == part}
        unit, whole = "KV groups" if part == "attention" else "neurons", len(blocks) > 1 and every == set(blocks)
        found.append(NarrowedSites(part, tuple(blocks), kept_, had, whole, unit, experts))
    return sorted(found, key=lambda each: (PARTS.index(each.part), each.blocks))


def kept_group_counts(result: RunResult) -> dict[str, tuple[int, int]]:
    """Of every narrowed site, how many of its channel groups were kept, and how many it had."""
    had = {size.site: len(size.groups) for size in result.anatomy.sites}
    return {str(kept.site): (len(kept.groups), had[kept.site]) for kept in sorted(result.plan.narrowed)}


def narrowed_sentence(result: RunResult, most: int = 6) -> str:
    """`Narrowed: all 30 MLPs: 1,229 of 1,536 neurons`, of the first kinds; empty where nothing is."""
    kinds = [str(kind) for kind in narrowed_sites(result)]
    more = f"; and {len(kinds) - most} more" if len(kinds) > most else ""
    return f"Narrowed: {'; '.join(kinds[:most])}{more}" if kinds else ""
