"""The page that holds runs against each other: figures, Pareto fronts, sites and flipped items."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING

from billhook.dashboard.entries import MOST, Entry, entries_of, paired
from billhook.dashboard.layout import page_html, plain_figure, run_address, when, with_origin
from billhook.dashboard.listing import Listed, Listing, opened
from billhook.dashboard.parts.diff import strips
from billhook.dashboard.parts.fronts import fronts, lines_key, tasks_chart
from billhook.dashboard.parts.related import comparisons_between
from billhook.report.frame import Section, escaped, scrolling
from billhook.report.numbers import format_duration, format_number, format_ratio, pluralize, visible_name

if TYPE_CHECKING:
    from starlette.requests import Request

KINDS = ("prune", "sweep", "compare")
COLUMNS = ("Student", "Removed", "Perplexity", "Over the first", "Parameters", "KV cache / token", "Decoding",
           "Tokens/s", "Peak memory", "Made in")  # fmt: skip
MOST_OFFERED = 200


def compare_page(listing: Listing, request: Request) -> str:
    """The runs that the address names, or a list to choose from."""
    asked, runs = request.query_params.getlist("run")[:MOST], listing.runs()
    with opened(listing.store) as db:
        entries = entries_of(db, asked)
        if not entries:
            body = _choose(runs, asked)
        else:
            body = _compared(db, entries, asked, runs)
    return page_html("Compare", listing.store, body, here="/compare")


def _choose(runs: Sequence[Listed], asked: Sequence[str]) -> str:
    able = [run for run in runs if run.finished and run.kind in KINDS][:MOST_OFFERED]
    missing = ", ".join(map(visible_name, asked))
    note = f'<p class="note">Nothing to compare in {escaped(missing)}: unknown, or not finished.</p>' if asked else ""
    if not able:
        return f"<h1>Compare</h1>{note}<p>No run has finished yet. A pruning, a sweep or a comparison is needed.</p>"
    boxes = "".join(
        f'<li><label><input type="checkbox" name="run" value="{escaped(run.id)}"> {escaped(run.id)} '
        f"{escaped(run.kind)} {escaped(visible_name(run.model))} {escaped(visible_name(run.remove))}</label> "
        f"<small>{when(run.created)}</small></li>"
        for run in able
    )
    return (
        f'<h1>Compare</h1>{note}<form action="/compare" class="choose"><p>Choose prunings, sweeps and comparisons.</p>'
        f'<ul class="plainlist">{boxes}</ul><button type="submit">Compare</button></form>'
    )


def _compared(db: sqlite3.Connection, entries: list[Entry], asked: Sequence[str], runs: Sequence[Listed]) -> str:
    texts = {entry.on for entry in entries if entry.on and entry.quality}
    notes = []
    if len(texts) > 1:
        notes.append(
            f"These were measured on {len(texts)} different held-out texts, so that their perplexities do not compare "
            "exactly. Over the first: in pairs, where the text is the same."
        )
    told = {entry.run for entry in entries}
    if left := [run for run in asked if run not in told]:
        notes.append(f"Without a result to compare: {', '.join(map(visible_name, left))}.")
    charts, tasks = fronts(entries), tasks_chart(entries)
    hint = "<p>Point at a student, or focus it, to single it out in every chart; press to keep it.</p>"
    drawn = f'<div class="two three">{"".join(charts)}</div>' if charts else _no_fronts(entries)
    linked = f'<div class="linked"><section>{lines_key(entries)}{hint}</section>{drawn}{tasks}</div>'
    names = {name for run in runs if run.id in asked for name in (run.id, run.out)}
    sections = [
        Section("figures", "Figures", _table(entries)),
        Section("fronts", "Quality, size and tasks", linked if charts or tasks else _no_fronts(entries)),
        Section("sites", "Sites", strips(entries)),
        Section("flips", "Items that flipped", comparisons_between(db, names)),
    ]
    noted = "".join(f'<p class="note">{escaped(note)}</p>' for note in notes)
    body = "".join(section.to_html() for section in sections if section.html)
    return f"<h1>{pluralize(len(entries), 'student')} compared</h1>{noted}{body}"


def _no_fronts(entries: Sequence[Entry]) -> str:
    few = "There are too few: a front needs two students with perplexity that differ in a size."
    return f"<p>{few}</p>" if entries else ""


def _table(entries: Sequence[Entry]) -> str:
    words = {0: ' data-words=""', 1: ' data-words=""'}
    head = "".join(
        f'<th scope="col"{words.get(i, "")}><button type="button">{name}</button></th>'
        for i, name in enumerate(COLUMNS)
    )
    rows = "".join(f"<tr>{_row(entry, entries[0])}</tr>" for entry in entries)
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    about = (
        "Perplexity: over the teacher's on held-out text. Over the first: over that of the first student, in pairs by "
        "document. In brackets: 95% intervals; point at a figure for its n. Counted figures have no interval."
    )
    return f"{scrolling(table, 'Figures')}<p>{about}</p>"


def _row(entry: Entry, first: Entry) -> str:
    link = f'<a href="{run_address(entry.run)}">{escaped(entry.name)}</a>'
    gone = f"{len(entry.plan.removed)} sites" + (
        f", {len(entry.plan.narrowed)} narrower" if entry.plan.narrowed else ""
    )
    cells: list[tuple[object, str]] = [(entry.name, link), (gone, escaped(gone) if entry.plan else "–")]
    ratio = None if entry is first else paired(first, entry)
    for estimate, what, spell in (
        (entry.quality, "Perplexity over the teacher's on held-out text", format_ratio),
        (ratio, "Perplexity over the first student's, in pairs by document", format_ratio),
    ):
        cells.append((estimate.value, with_origin(estimate, spell, what)) if estimate else ("", "–"))
    for what, unit in (("parameters", ""), ("kv_bytes_per_token", "B")):
        left, size = entry.left(what), getattr(entry.sizes, what) if entry.sizes else None
        text = "–" if left is None else f"{format_number(size, unit)} ({left:.1%})"
        cells.append(("" if size is None else size, plain_figure(text, "Counted")))
    for estimate, what, spell in (
        (entry.decode, "Decoding speed over the teacher's, timed in turn", format_ratio),
        (entry.rate, "Tokens decoded per second", format_number),
    ):
        cells.append((estimate.value, with_origin(estimate, spell, what)) if estimate else ("", "–"))
    cells.append((entry.memory or "", plain_figure(format_number(entry.memory, "B"), "One process, no interval")))
    took = "–" if entry.seconds is None else format_duration(entry.seconds)
    cells.append((entry.seconds or "", plain_figure(took, "All stages of a pruning, the search of a trial")))
    return "".join(
        f'<{"th scope=row" if i == 0 else "td"} data-sort="{escaped(value)}">{cell}</{"th" if i == 0 else "td"}>'
        for i, (value, cell) in enumerate(cells)
    )
