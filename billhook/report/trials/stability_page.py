"""The page of a study of stability: agreement against calibration size, and the sites behind it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape

from billhook.core.plan import PARTS, Site
from billhook.core.results.studies import PairSpread, StabilityResult, StabilitySize
from billhook.report.charts import Axis, Line, Point, figure, key_of, xy_chart
from billhook.report.frame import Section, caption, details, html_table, page_html, scrolling
from billhook.report.numbers import (
    Spell,
    count_items,
    format_correlation,
    format_interval,
    format_share,
    printable,
)
from billhook.report.pages import page
from billhook.report.study_words import removal_counts, stability_headline


@page(StabilityResult)
def stability_page(result: StabilityResult) -> str:
    """One page of a study of stability."""
    made = f"Billhook · stability · remove {printable(result.remove)}"
    return page_html(stability_title(result), made, stability_headline(result), (), stability_sections(result))


def stability_title(result: StabilityResult) -> str:
    """The heading of the page."""
    return f"{printable(result.model)}: how far {printable(result.metric)} can be trusted"


def stability_sections(result: StabilityResult) -> list[Section]:
    """Agreement as a chart and in numbers, what next, which sites are removed, and how."""
    sizes = sorted(result.sizes, key=lambda size: size.tokens)
    numbers, sites = _tables(sizes)
    table = details("The same as a table", html_table(("Tokens", "In all plans", "In some plans (in how many)"), sites))
    conditions = html_table(("", ""), _stability_conditions(result))
    return [
        Section("agreement", "Agreement of calibration sets", _agreement(sizes) + numbers),
        Section("next", "What next", _next(result, sizes[-1])),
        Section("sites", "Which sites are removed", _votes(sizes) + table),
        Section("how", "How it was measured", conditions),
    ]


def _agreement(sizes: Sequence[StabilitySize]) -> str:
    """Both measures against the number of tokens; nothing for a single one, which the table says."""
    if len(sizes) < 2:
        return ""

    def points(name: str, spell: Spell) -> tuple[Point, ...]:
        found = []
        for size in sizes:
            spread: PairSpread = getattr(size, name)
            tip = f"{size.tokens:,} tokens: {spell(spread.mean)} ({format_interval(spread, spell)})"
            found.append(Point(math.log(size.tokens), spread.mean, tip, spread.low, spread.high))
        return tuple(found)

    lines = [
        Line("rank correlation", points("rank_correlation", format_correlation), joined=True, shift=-4),
        Line("overlap of plans", points("overlap", format_share), "--blue", "diamond", joined=True, shift=4),
    ]
    x = Axis("calibration tokens of a set", "exp", ticks=tuple(math.log(size.tokens) for size in sizes))
    option = xy_chart(lines, x, Axis("", "number", high=1.0))
    label = "Rank correlation and plan overlap against calibration tokens; the table below has the numbers."
    text = (
        "Dots: mean over all pairs of sets; whiskers: lowest and highest pair, which is no confidence interval. Rank "
        "correlation (Spearman) is of the scores of all sites; overlap is what two plans share of all that either "
        "removes."
    )
    return figure(option, title="", label=label, caption=text, key=key_of(lines))


def _tables(sizes: Sequence[StabilitySize]) -> tuple[str, list[tuple[str, str, str]]]:
    """The table of numbers, and the lines of that of sites."""
    lines, sites = [], []
    for size in sizes:
        ranks, overlap, votes = size.rank_correlation, size.overlap, removal_counts(size)
        always = [site for site, n in votes.items() if n == size.sets]
        some = {site: n for site, n in votes.items() if n < size.sets}
        pairs = size.sets * (size.sets - 1) // 2
        cells = (
            f"{format_correlation(ranks.mean)} ({format_interval(ranks, format_correlation)})",
            f"{format_share(overlap.mean)} ({format_interval(overlap, format_share)})",
        )
        lines.append((f"{size.tokens:,}", *cells, str(size.sets), str(pairs), str(len(always)), str(len(some))))
        sites.append((f"{size.tokens:,}", _parts(dict.fromkeys(always, 0)), _parts(some)))
    heads = ("Tokens", "Rank correlation", "Overlap of plans", "Sets", "Pairs", "Sites in all plans", "In some")
    return scrolling(html_table(heads, lines), "In numbers") + caption("In brackets: lowest to highest pair."), sites


ENOUGH = 0.8  # overlap of plans from which on the text hardly decides what is removed


def _next(result: StabilityResult, most: StabilitySize) -> str:
    """More tokens where the plans of the largest sets do not overlap, else the command that prunes with as many."""
    enough, model = most.overlap.mean >= ENOUGH, shlex.quote(printable(result.model))
    tokens = most.tokens if enough else 4 * most.tokens
    command, words = (
        (f"billhook prune {model} --tokens {tokens} --remove {shlex.quote(printable(result.remove))}",
         "The plans of the largest sets agree. Prune with as many tokens:")
        if enough else
        (f"billhook stability {model} --sizes {most.tokens},{tokens} --remove {shlex.quote(printable(result.remove))}",
         f"Even the largest sets share less than {format_share(ENOUGH)} of what they remove. Try more tokens:")
    )  # fmt: skip
    return f'<p class="plain">{words}</p><pre>{escape(command)}</pre>'


def _parts(votes: Mapping[str, int]) -> str:
    """`attention 2, 4 (3); mlp 16`: sites and, where it is not 0, their number of plans."""
    blocks: dict[str, list[str]] = {}
    for site, n in votes.items():
        part, block = site.split(".")
        blocks.setdefault(part, []).append(f"{block} ({n})" if n else block)
    return "; ".join(f"{part} {', '.join(numbers)}" for part, numbers in sorted(blocks.items())) or "none"


def _stability_conditions(result: StabilityResult) -> list[tuple[str, str]]:
    data = result.data
    facts = f"{printable(data.source)}: {data.tokens:,} tokens, {count_items(data)}"
    asked = {"Metric": result.metric, "Search": result.search, "Size asked": result.remove}
    return [
        *((key, printable(value)) for key, value in asked.items()),
        ("Calibration", f"{facts}; no two sets share {'a document' if data.items is None else 'an item'}"),
    ]


def _votes(sizes: Sequence[StabilitySize]) -> str:
    """Blocks from left to right, ten to a table; a row a part and calibration size, as deep as plans agree."""
    votes = [removal_counts(size) for size in sizes]
    last = max((site.block for size in sizes for plan in size.plans for site in plan.removed), default=0)
    tables = []
    for start in range(0, last + 1, 10):
        blocks = range(start, min(start + 10, last + 1))
        lines = f"<tr><th>block</th>{''.join(f'<th scope=col>{block}</th>' for block in blocks)}</tr>"
        for part in PARTS:
            lines += f'<tr class="part"><th colspan="{len(blocks) + 1}">{part}</th></tr>'
            for size, each in zip(sizes, votes, strict=True):
                lines += f"<tr><th scope=row>{size.tokens:,}</th>"
                for name in (str(Site(block, part)) for block in blocks):
                    n = each.get(name, 0)
                    about = f"{name}: in {n} of {size.sets} plans with {size.tokens:,} tokens"
                    kind = "none" if not n else "all" if n == size.sets else "some"
                    depth = f"{100 * n / size.sets:.0f}%"
                    lines += f'<td><i class="{kind}" data-vars="depth:{depth}" title="{about}">{n or ""}</i></td>'
                lines += "</tr>"
        tables.append(f'<table data-vars="n:{len(blocks)}">{lines}</table>')
    caption = f"In how many plans each site is removed, a row for each number of tokens. After block {last}: none."
    return f'<div class="map long votes">{"".join(tables)}</div><p>{caption}</p>'
