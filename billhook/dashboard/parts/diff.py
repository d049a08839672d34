"""Models held against each other site by site: strips, one below the other."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.core.plan import PARTS, Part, Plan, Site
from billhook.dashboard.entries import Entry
from billhook.report.frame import escaped
from billhook.report.numbers import join_words, pluralize

ACROSS = 10  # blocks of a table, so that narrow screens can stack the tables
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_NAMES = 10


def strips(entries: Sequence[Entry]) -> str:
    """A row a student and part, blocks from left to right; nothing where fewer than two have the same sites."""
    alike = comparable(entries)
    if len(alike) < 2:
        return ""
    blocks = max(site.block for site in _sites(alike[0])) + 1
    tables = []
    for start in range(0, blocks, ACROSS):
        span = range(start, min(start + ACROSS, blocks))
        heads = "".join(f'<th scope="col">{block}</th>' for block in span)
        rows = "".join(
            f'<tr><th scope="row">{LETTERS[number]} {part}</th>{_cells(entry, number, part, span)}</tr>'
            for part in PARTS
            for number, entry in enumerate(alike)
        )
        tables.append(f'<table data-vars="n:{len(span)}"><tr><th>block</th>{heads}</tr>{rows}</table>')
    legend = "".join(
        f"<li><strong>{LETTERS[number]}</strong> {escaped(entry.name)}"
        + (f", repaired by {escaped(entry.repaired)}" if entry.repaired else ", not repaired")
        + "</li>"
        for number, entry in enumerate(alike)
    )
    marks = (
        '<p class="marks" aria-hidden="true"><span><i class="kept"></i>kept</span><span><i class="removed"></i>removed'
        '</span><span><i class="narrower"></i>narrower: the lower part stays</span></p>'
    )
    return f'<ul class="legend">{legend}</ul><div class="map diff">{"".join(tables)}</div>{marks}{_words(alike)}'


def comparable(entries: Sequence[Entry]) -> list[Entry]:
    """The students whose sites are known, and are those of the first of them."""
    known = [entry for entry in entries if entry.anatomy is not None]
    return [entry for entry in known if _sites(entry) == _sites(known[0])][: len(LETTERS)]


def _sites(entry: Entry) -> tuple[Site, ...]:
    return entry.anatomy.sites_present() if entry.anatomy else ()


def _cells(entry: Entry, number: int, part: Part, span: range) -> str:
    assert entry.anatomy is not None
    had = {size.site: len(size.groups) for size in entry.anatomy.sites}
    left = {narrow.site: len(narrow.groups) / had[narrow.site] for narrow in entry.plan.narrowed}
    cells = []
    for block in span:
        site = Site(block, part)
        state = "removed" if site in entry.plan.removed else "narrower" if site in left else "kept"
        told = f", {left[site]:.0%} of its channel groups kept" if site in left else ""
        about = escaped(f"{entry.name}: {site} {'earlier removed' if site not in had else state}{told}")
        kind = state if site in had else "earlier"
        more = f' data-vars="left:{left[site]:.0%}"' if site in left else ""
        stop = 0 if block == 0 else -1
        cells.append(
            f'<td><button type="button" class="{kind}" data-site="{number}{part}.{block}" tabindex="{stop}" '
            f'aria-label="{about}"{more}></button></td>'
        )
    return "".join(cells)


def _words(entries: Sequence[Entry]) -> str:
    """What each removes or narrows that the first does not, and the other way round."""
    lines = []
    for number, entry in enumerate(entries[1:], 1):
        only_first, only_other, alike = _difference(entries[0].plan, entry.plan, len(_sites(entry)))
        words = [f"{pluralize(alike, 'site')} alike"]
        words += [f"only A changes {join_words(only_first, MOST_NAMES)}"] if only_first else []
        words += [f"only {LETTERS[number]} changes {join_words(only_other, MOST_NAMES)}"] if only_other else []
        lines.append(f"<li>A and {LETTERS[number]}: {escaped('; '.join(words))}.</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _difference(first: Plan, other: Plan, sites: int) -> tuple[list[str], list[str], int]:
    """What only the first changes, what only the other does, and how many sites are alike in both."""

    def changes(plan: Plan) -> dict[Site, str]:
        told = {site: f"{site} (removed)" for site in plan.removed}
        return told | {narrow.site: f"{narrow.site} (to {len(narrow.groups):,})" for narrow in plan.narrowed}

    a, b = changes(first), changes(other)
    differ = {site for site in a.keys() | b.keys() if a.get(site) != b.get(site)}
    return [a[s] for s in sorted(differ & a.keys())], [b[s] for s in sorted(differ & b.keys())], sites - len(differ)
