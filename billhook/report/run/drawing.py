"""The architecture of a model before and after a plan, as one drawing in SVG."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from billhook.core.anatomy import Anatomy, SiteSize
from billhook.core.plan import PARTS, Part, Plan, Site
from billhook.report.numbers import format_number

CELL, GAP, ROW = 26, 4, 30  # pixels: the width of a block, what is between two, and blocks in a row
LABELS = 92
TALL: dict[Part, int] = {"attention": 34, "mlp": 52}
KV = 20
STYLE = """
.bh text { font: 12px system-ui, sans-serif; fill: #57606a; }
.bh .head { font-weight: 600; font-size: 14px; fill: #1b1f24; }
.bh .attention { fill: #3b82b0; } .bh .mlp { fill: #d9691b; } .bh .kv { fill: #808b97; }
.bh .was { fill: none; stroke: #9aa5b1; stroke-dasharray: 3 2; }
@media (prefers-color-scheme: dark) {
  .bh text { fill: #9aa5b1; } .bh .head { fill: #e4e7eb; } .bh .was { stroke: #6b7681; }
}
"""


@dataclass(frozen=True, slots=True)
class _Kept:
    """How much of a site is there: its share of the channel groups, its KV cache in bytes a token, and words."""

    share: float
    kv_bytes: int
    words: str


def architecture_svg(anatomy: Anatomy, plan: Plan, *, styled: bool = True) -> str:
    """Return a drawing of the model before and after `plan`: blocks from left to right, a box for each site.

    A box is as tall as its site has parameters, and filled as far as it is kept; below it is its KV cache. Each box
    has a title for readers who point at it. `styled`: with its own colours for light and dark, for a file; a page has
    them in style.css, because a strict policy forbids style elements.
    """
    before, after = anatomy.sizes(), anatomy.sizes(plan)
    rows = range(0, anatomy.blocks, ROW)
    panels: list[str] = []
    top = 0
    for name, sizes, given in (("Before", before, Plan()), ("After", after, plan)):
        told = f"{name}: {format_number(sizes.parameters)} parameters"
        if sizes.kv_bytes_per_token:
            told += f", {format_number(sizes.kv_bytes_per_token, 'B')} of KV cache per token"
        top += 22
        panels.append(f'<text class="head" x="0" y="{top - 6}">{escape(told)}</text>')
        for start in rows:
            panels.append(_row(anatomy, given, start, top))
            top += _tall(anatomy) + 24
        top += 4
    wide = LABELS + min(anatomy.blocks, ROW) * (CELL + GAP)
    label = f"{anatomy.blocks} blocks, before: {before.parameters:,} parameters; after: {after.parameters:,}"
    style = f"<style>{STYLE}</style>" if styled else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bh" viewBox="0 0 {wide} {top}" width="{wide}" height="{top}" '
        f'role="img" aria-label="{escape(label)}">{style}{"".join(panels)}</svg>'
    )


def _tall(anatomy: Anatomy) -> int:
    return sum(TALL.values()) + GAP + (KV + GAP if any(size.kv_bytes_per_token for size in anatomy.sites) else 0)


def _row(anatomy: Anatomy, plan: Plan, start: int, top: int) -> str:
    """One row of blocks: attention above mlp above KV cache, with the numbers of the blocks below."""
    sizes = {size.site: size for size in anatomy.sites}
    kept = {narrow.site: len(narrow.groups) for narrow in plan.narrowed}
    most = {part: max((s.parameters for s in anatomy.sites if s.site.part == part), default=1) for part in PARTS}
    caches = max((size.kv_bytes_per_token for size in anatomy.sites), default=0)
    last, drawn = min(start + ROW, anatomy.blocks), []
    for block in range(start, last):
        x, y = LABELS + (block - start) * (CELL + GAP), top
        cache = 0
        for part in PARTS:
            size = sizes.get(Site(block, part))
            if size is not None:
                found = _kept(size, plan, kept.get(size.site))
                tall = TALL[part] * size.parameters / most[part]
                drawn.append(_box(part, (x, y + TALL[part] - tall, tall), found))
                cache += found.kv_bytes
            y += TALL[part] + GAP
        if caches:
            had = sum(s.kv_bytes_per_token for part in PARTS if (s := sizes.get(Site(block, part))) is not None)
            told = f"block {block}: {cache:,} bytes of KV cache per token, of {had:,}"
            drawn.append(_box("kv", (x, y, KV * had / caches), _Kept(cache / had if had else 0.0, cache, told)))
            y += KV + GAP
        if block % 5 == 0 or block == anatomy.blocks - 1:
            drawn.append(f'<text x="{x + CELL / 2}" y="{y + 10}" text-anchor="middle">{block}</text>')
    labels, y = [], top
    for words, tall in (*((part, TALL[part]) for part in PARTS), *([("KV cache", KV)] if caches else [])):
        labels.append(f'<text x="0" y="{y + tall / 2 + 4:g}">{words}</text>')
        y += tall + GAP
    labels.append(f'<text x="0" y="{y + 10}">block</text>')
    return "".join(labels + drawn)


def _kept(size: SiteSize, plan: Plan, groups: int | None) -> _Kept:
    site = size.site
    if site in plan.removed:
        return _Kept(0.0, 0, f"{site}: removed, {size.parameters:,} parameters")
    if groups is None or size.group is None:
        return _Kept(1.0, size.kv_bytes_per_token, f"{site}: {size.parameters:,} parameters")
    lost = len(size.groups) - groups
    words = f"{site}: {groups:,} of {len(size.groups):,} channel groups kept"
    cache = size.kv_bytes_per_token - lost * size.group.kv_bytes_per_token
    return _Kept(groups / len(size.groups), cache, words)


def _box(kind: str, place: tuple[float, float, float], kept: _Kept) -> str:
    """A box at (x, y, height), filled from below as far as it is kept, dashed where it was more."""
    x, y, tall = place
    if tall <= 0:
        return ""
    filled = tall * kept.share
    was = f'<rect class="was" x="{x + 0.5:g}" y="{y + 0.5:.2f}" width="{CELL - 1}" height="{max(tall - 1, 0.5):.2f}"/>'
    full = f'<rect class="{kind}" x="{x:g}" y="{y + tall - filled:.2f}" width="{CELL}" height="{filled:.2f}" rx="2"/>'
    parts = (was if kept.share < 1 else "") + (full if filled else "")
    return f"<g><title>{escape(kept.words)}</title>{parts}</g>"
