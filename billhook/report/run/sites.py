"""The sites of a run: the strip that shows what was removed, what each site is worth and costs, and why it went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from billhook.core.anatomy import SiteSize
from billhook.core.plan import PARTS, Site
from billhook.core.results.measured import Z_95, Step
from billhook.core.results.run import Exchange, RunResult, SiteLoss
from billhook.report.charts import Axis, Line, Point, figure, key_of, round_ticks, xy_chart
from billhook.report.frame import caption, details, escaped, html_table, scrolling, sortable_table
from billhook.report.numbers import format_number, pluralize
from billhook.report.run.narrowed import kept_group_counts, narrowed_sites
from billhook.report.run.search_words import search_in_words


def removed_earlier(result: RunResult) -> list[Site]:
    """Sites of the unpruned model that were removed before this run."""
    present = set(result.anatomy.sites_present())
    all_sites = (Site(block, part) for block in range(result.anatomy.blocks) for part in PARTS)
    return [site for site in all_sites if site not in present]


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """What became of one site of the unpruned model: its state, the mark of its cell, and why, in words.

    `state`: kept, narrower, removed or earlier; `share`: of its channel groups, kept.
    """

    site: Site
    state: str
    mark: str
    why: str
    share: float
    size: SiteSize | None
    alone: SiteLoss | None


def facts_of_sites(result: RunResult) -> list[SiteFacts]:
    """Every site of the unpruned model, in order."""
    turn = {site: (number, step) for number, step in enumerate(result.steps, 1) for site in step.sites}
    counts, sizes = kept_group_counts(result), {size.site: size for size in result.anatomy.sites}
    alone = {each.site: each for each in result.alone}
    influence = result.search.influence
    doubts = {each.site: _doubt(each) for each in (influence.exchanges if influence else ()) if each.gap < 0}
    facts = [
        SiteFacts(site, "earlier", "", "removed before this run", 0.0, None, None) for site in removed_earlier(result)
    ]
    for site, size in sizes.items():
        state, mark, why, share = "kept", "", "kept", 1.0
        if str(site) in counts:
            kept, had = counts[str(site)]
            state, why, share = "narrower", f"keeps {kept:,} of {had:,} channel groups", kept / had
        elif site in result.plan.removed:
            state, mark, why, share = "removed", "×", "removed by the given plan", 0.0
            if site in turn:
                number, step = turn[site]
                mark, why = str(number), _why(number, len(result.steps), step)
        facts.append(SiteFacts(site, state, mark, why + doubts.get(site, ""), share, size, alone.get(site)))
    return sorted(facts, key=lambda each: each.site)


def _doubt(other: Exchange) -> str:
    """`; unseen text takes attention.6 instead, 0.0031 ± 0.0012 lower`."""
    error = "" if other.gap_se is None else f" ± {format_number(Z_95 * other.gap_se)}"
    noise = "" if other.is_clear else ", which may be noise"
    return f"; unseen text takes {other.other} instead, {format_number(-other.gap)}{error} lower{noise}"


def _why(number: int, of: int, step: Step) -> str:
    """`removal 3 of 15, loss 0.0123 after it, the second best 0.0007 ± 0.0004 worse`."""
    words = f"removal {number} of {of}, loss {step.loss:.4g} after it"
    if step.gap is None:
        return words
    gap = format_number(step.gap)
    if step.gap_se is None:
        return f"{words}, the second best {gap} worse"
    clear = "" if step.gap > Z_95 * step.gap_se else ", which may be noise"
    return f"{words}, the second best {gap} ± {format_number(Z_95 * step.gap_se)} worse{clear}"


# -- the strip ---------------------------------------------------------------------------------------------------------


def strip(result: RunResult) -> str:
    """Blocks from left to right, ten to a table, so that narrow screens can stack the tables; attention above mlp."""
    facts, blocks, tables = {each.site: each for each in facts_of_sites(result)}, result.anatomy.blocks, []
    for start in range(0, blocks, 10):
        span = range(start, min(start + 10, blocks))
        lines = f"<tr><th>block</th>{''.join(f'<th scope=col>{block}</th>' for block in span)}</tr>"
        for part in PARTS:
            cells = "".join(_cell(facts[Site(block, part)]) for block in span)
            lines += f"<tr><th scope=row>{part}</th>{cells}</tr>"
        tables.append(f'<table data-vars="n:{len(span)}">{lines}</table>')
    narrowed = any(each.state == "narrower" for each in facts.values())
    earlier = any(each.state == "earlier" for each in facts.values())
    ordered = any(fact.mark.isdecimal() for fact in facts.values())
    marks = [("kept", "", "kept")]
    marks += [("removed", "3", "removed; numbers give the order")] * ordered
    marks += [("removed", "×", "removed")] * any(fact.mark == "×" for fact in facts.values())
    marks += [("narrower", "", "narrowed: the lower part is kept")] * narrowed
    marks += [("earlier", "", "removed before this run")] * earlier
    shown = "".join(f'<span><i class="{kind}">{mark}</i>{words}</span>' for kind, mark, words in marks)
    long = " long" if blocks > 30 else ""
    return f'<div class="map{long}">{"".join(tables)}</div><p class="marks" aria-hidden="true">{shown}</p>'


def _cell(fact: SiteFacts) -> str:
    stop = 0 if fact.site == Site(0, "attention") else -1
    told = [f"{fact.site}: {fact.size.parameters:,} parameters" if fact.size else str(fact.site), fact.why]
    if fact.alone is not None:
        told.append(f"removed alone it costs a loss of {_loss(fact.alone)}")
    shown = f'class="{fact.state}" data-site="{fact.site}" tabindex="{stop}" aria-label="{escaped(", ".join(told))}"'
    shown += f' data-vars="left:{fact.share:.0%}"' if fact.state == "narrower" else ""
    return f'<td><button type="button" {shown}>{fact.mark}</button></td>'


def _loss(alone: SiteLoss) -> str:
    if alone.at_least:
        return f"≥ {alone.loss:.3g}"
    return f"{alone.loss:.3g}" + ("" if alone.se is None else f" ± {Z_95 * alone.se:.2g}")


# -- what each is worth ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteTimes:
    """Milliseconds of a decoding step that each site takes, and in words where they come from."""

    ms: dict[Site, float]
    about: str
    measured: bool


def site_times(result: RunResult) -> SiteTimes | None:
    """The time of each site: measured where a budget counts time, else its share of the teacher's measured step."""
    sizes = result.anatomy.sites
    if all(size.ns_per_token for size in sizes):
        words = "Time: of a decoding step, measured by removing all sites of a kind and size; it has no interval."
        return SiteTimes({size.site: size.ns_per_token / 1e6 for size in sizes}, words, True)
    if result.speed is None:
        return None
    rate, batch = result.speed.teacher.decode_tokens_per_s.value, result.speed.protocol.batch
    step, whole = 1000 * batch / rate, result.sizes.teacher.flops_per_token
    words = (
        f"Time: predicted, with no interval; the share that a site has in the weights that a token uses, of the "
        f"teacher's measured decoding step of {step:.3g} ms at batch {batch}. --remove 20%ms measures it."
    )
    return SiteTimes({size.site: step * size.flops_per_token / whole for size in sizes}, words, False)


def sites_table(result: RunResult) -> str:
    """Every site with what it is worth and costs, and why it went; sorted by a press of a heading."""
    times, alone = site_times(result), bool(result.alone)
    heads = [("Site", "")]
    heads += [("Loss alone", result.loss_unit)] if alone else []
    heads += [("Loss per ms", f"{result.loss_unit} per ms of a step")] if alone and times else []
    heads += [("Loss per M", "million parameters")] if alone else []
    heads += [("Time", f"ms of a step, {'measured' if times.measured else 'predicted'}")] if times else []
    heads += [("Parameters", ""), ("KV cache", "bytes per token"), ("FLOPs", "per token"), ("What became of it", "")]
    lines = []
    for fact in facts_of_sites(result):
        if fact.size is None:
            continue
        size, ms = fact.size, times.ms[fact.site] if times else 0.0
        cells: list[tuple[object, str]] = [(fact.site.block * 2 + (fact.site.part == "mlp"), str(fact.site))]
        per = [1.0, *([ms] if times else []), size.parameters / 1e6] if alone else []
        cells += [_loss_cell(fact.alone, each) for each in per]
        cells += [(ms, f"{ms:.3g}")] if times else []
        cells += [(n, f"{n:,}") for n in (size.parameters, size.kv_bytes_per_token, size.flops_per_token)]
        lines.append([*cells, (fact.why, fact.why)])
    words = "Loss alone: of the model without this one site, measured by the search; ± 95% over documents. " * alone
    table = scrolling(sortable_table(heads, lines, [len(heads) - 1]), "Sites", tall=True)
    return table + caption(words + (times.about if times else ""))


def _loss_cell(alone: SiteLoss | None, per: float) -> tuple[float, str]:
    """The loss of a site alone over what it costs; what is not known sorts last."""
    if alone is None or not per:
        return 1e308, "–"
    se = None if alone.se is None else alone.se / per
    each = replace(alone, loss=alone.loss / per, se=se)
    return each.loss, _loss(each)


def worth_chart(result: RunResult) -> str:
    """What removing each site alone loses, by block; nothing where no two sites were measured so."""
    facts = [fact for fact in facts_of_sites(result) if fact.alone is not None and fact.alone.loss > 0]
    if len(facts) < 2:
        return ""
    lowest = min(fact.alone.loss for fact in facts if fact.alone)
    lines = []
    for part, colour, symbol, shift in (("attention", "--blue", "circle", -3), ("mlp", "--orange", "diamond", 3)):
        points = tuple(_worth(fact, lowest / 2) for fact in facts if fact.site.part == part)
        lines.append(Line(part, points, colour, symbol, shift=shift))
    y = Axis(f"loss ({result.loss}, {result.loss_unit}) without the site", "exp")
    last = result.anatomy.blocks - 1
    x = Axis("block", "integer", low=-0.5, high=last + 0.5, ticks=round_ticks(0, max(last, 1)))
    tokens = max(fact.alone.tokens for fact in facts if fact.alone)
    text = (
        f"Each site removed alone, measured by the search on {tokens:,} calibration tokens; whiskers: 95% intervals "
        "over documents. Hollow: removed. Arrows: at least so much; the search dropped these as soon as they were "
        "certain to lose. Equal distances are equal ratios."
    )
    label = f"Loss without each of {len(facts)} sites, from {lowest:.3g} up; the table of sites has the numbers."
    return figure(xy_chart(lines, x, y), title="What each site is worth", label=label, caption=text, key=key_of(lines))


def _worth(fact: SiteFacts, least: float) -> Point:
    assert fact.alone is not None
    alone, se = fact.alone, fact.alone.se
    ends = (None, None) if se is None else (max(alone.loss - Z_95 * se, least), alone.loss + Z_95 * se)
    low, high = (None if end is None else math.log(end) for end in ends)
    tip = f"{fact.site}: {fact.why}\nalone: loss {_loss(alone)}"
    return Point(fact.site.block, math.log(alone.loss), tip, low, high, symbol="arrow" if alone.at_least else "",
                 hollow=fact.state == "removed")  # fmt: skip


# -- the removals ------------------------------------------------------------------------------------------------------


def removed_in_step(step: Step) -> str:
    """What one step removed, in words."""
    narrowed = [f"{pluralize(len(step.narrowed), 'site')} narrowed"] if step.narrowed else []
    return ", ".join([*map(str, step.sites), *narrowed])


def removals(result: RunResult) -> str:
    """How the search went, what was narrowed, and the removals as a table."""
    words = caption(search_in_words(result.search))
    if kinds := narrowed_sites(result):
        words += "".join(f'<p class="plain">{escaped(str(kind))}</p>' for kind in kinds[:12])
        words += caption(f"And {len(kinds) - 12} more kinds; the table of sites has all.") if len(kinds) > 12 else ""
    if not result.steps:
        return "<p>A given plan was applied without a search, so its removals have no order and no losses.</p>" + words
    if len(result.steps) == 1 and not result.steps[0].sites:
        return words  # one step that narrows: nothing came before or after anything
    sizes = {size.site: size.parameters for size in result.anatomy.sites}
    lines = [
        (
            str(number),
            removed_in_step(step),
            "" if step.narrowed else format_number(sum(sizes.get(site, 0) for site in step.sites)),
            f"{step.loss:.4g}" + _more(step.loss_se),
            format_number(step.gap) + _more(step.gap_se),
        )
        for number, step in enumerate(result.steps, 1)
    ]
    table = scrolling(html_table(("No.", "Site", "Parameters", "Loss ± 95%", "Gap ± 95%"), lines), "Removals")
    return words + details("The removals in order, as a table", table)


def _more(se: float | None) -> str:
    return "" if se is None else f" ± {format_number(Z_95 * se)}"


def sites_in_words(sites: Sequence[Site]) -> list[str]:
    """`attention of blocks 3, 5` and `mlp of block 2`."""
    words = []
    for part in PARTS:
        blocks = [str(site.block) for site in sites if site.part == part]
        if blocks:
            words.append(f"{part} of block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)}")
    return words
