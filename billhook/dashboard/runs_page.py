"""The page of all runs: a table to sort, filter and select from, whose live rows move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from billhook.dashboard.layout import page_html, plain_figure, run_address, when, with_origin
from billhook.dashboard.listing import Figures, Listed, Listing, Parts, opened, seen_in
from billhook.dashboard.parts.status import status_line
from billhook.dashboard.progress import progress_of
from billhook.report.frame import escaped
from billhook.report.numbers import format_duration, format_number, format_ratio, pluralize, shown_ratio, visible_name

if TYPE_CHECKING:
    from starlette.requests import Request

COLUMNS = (  # name, how it sorts, and which end of it is the best
    ("Run", "text", ""), ("State", "text", ""), ("Model", "text", ""), ("Kind", "text", ""), ("Removed", "number", ""),
    ("Perplexity", "number", "low"), ("Parameters", "number", "low"), ("KV cache", "number", "low"),
    ("Decoding", "number", "high"), ("Took", "number", "low"),
)  # fmt: skip
MOST = 100  # rows that the page begins with, and lays out at once
STATES = ("running", "interrupted", "failed", "done")


def runs_page(listing: Listing, request: Request) -> str:
    """All runs of the store."""
    runs = listing.runs()
    rows = "".join(_rows(listing, runs[:MOST]).values())
    rest = f' data-rest="/rows?after={MOST}"' if len(runs) > MOST else ""
    head = "".join(
        f'<th scope="col" data-sort="{sort}" data-best="{best}"><button type="button">{name}</button></th>'
        for name, sort, best in COLUMNS
    )
    empty = "" if runs else '<p class="verdict">No runs yet. Start one: <code>billhook prune --remove 25%</code></p>'
    body = f"""<h1>Runs</h1>{empty}
<form action="/compare" id="runs">
<div class="filters" role="search">{_filters(runs)}</div>
<div class="act"><button type="submit" id="compare">Compare the selected</button> <output id="count"
 aria-live="polite">{pluralize(len(runs), "run")}</output></div>
<div class="scroll" role="region" tabindex="0" aria-label="Runs"><table class="runs"><thead><tr><td></td>{head}</tr>
</thead><tbody id="rows" data-most="{MOST}"{rest}>{rows}</tbody></table></div>
<button type="button" id="more" hidden>Show all</button></form>
<section><p>Perplexity: the student's over the teacher's on held-out text. Decoding: its speed over the teacher's. In
brackets: 95% intervals; dotted: an interval that rests on too little. Parameters and KV cache: counted, so there is
no interval. ★: the best of a column among the runs of one model that are shown. To tag a run: <code>billhook tag RUN
WORD</code></p></section>"""
    return page_html("Runs", listing.store, body, here="/", events=f"/events?since={seen_in(runs)}", charts=False)


def more_rows(listing: Listing, request: Request) -> str:
    """The rows of the runs after the first so many, as a table to take them from."""
    after = request.query_params.get("after", "")
    rows = _rows(listing, listing.runs()[int(after) if after.isascii() and after.isdigit() and len(after) < 9 else 0 :])
    return f"<table><tbody>{''.join(rows.values())}</tbody></table>"


def parts(listing: Listing, runs: Iterable[Listed]) -> Parts:
    """The rows of these runs."""
    return _rows(listing, list(runs))


def _rows(listing: Listing, runs: list[Listed]) -> Parts:
    live = {run.id: "" for run in runs if run.state == "running"}
    if live:
        with opened(listing.store) as db:
            for run in live:
                found = progress_of(db, listing.store, run)
                live[run] = f'<div class="live">{status_line(found)}</div>' if found else ""
    return {f"row-{run.id}": _row(run, live.get(run.id, "")) for run in runs}


def _row(run: Listed, live: str) -> str:
    shown, model = escaped(visible_name(run.id)), visible_name(run.model)
    tags = "".join(f'<span class="tag">{escaped(visible_name(tag))}</span>' for tag in run.tags)
    box = f'<input type="checkbox" name="run" value="{escaped(run.id)}" aria-label="Select {shown}">'
    kept = f'data-state="{run.state}" data-kind="{escaped(run.kind)}" data-model="{escaped(model)}"'
    figures = _figures(run.figures) if run.figures else [("", "–")] * 4
    took = plain_figure(format_duration(run.figures.seconds), "Seconds of all stages") if run.figures else "–"
    cells = [
        (
            f"{run.created:.0f}",
            f'<a href="{run_address(run.id)}">{shown}</a> <small>{when(run.created)}</small> {tags}',
        ),
        (run.state, f'<span class="state {run.state}">{run.state}</span>{live}'),
        (model, escaped(model)),
        (run.kind, escaped(run.kind)),
        (_removed(run), escaped(visible_name(run.remove)) or "–"),
        *figures,
        (f"{run.figures.seconds}" if run.figures else "", took),
    ]
    drawn = "".join(
        f'<{"th scope=row" if i == 0 else "td"} data-value="{escaped(value)}" data-name="{COLUMNS[i][0]}">{cell}'
        f"</{'th' if i == 0 else 'td'}>"
        for i, (value, cell) in enumerate(cells)
    )
    return f'<tr id="row-{escaped(run.id)}" {kept} data-tags="{escaped(" ".join(run.tags))}"><td>{box}</td>{drawn}</tr>'


def _removed(run: Listed) -> str:
    """What the column of the budget sorts by: the share of the parameters that is gone."""
    left = run.figures.left("parameters") if run.figures else None
    return "" if left is None else f"{1 - left:.6f}"


def _figures(found: Figures) -> list[tuple[str, str]]:
    """What a column sorts by, and its cell: perplexity, parameters, KV cache, decoding."""
    cells = [("", "–")]
    if quality := found.perplexity:
        cell = with_origin(quality.ratio, format_ratio, "Perplexity, student over teacher, on held-out text")
        cells = [(f"{quality.ratio.value:.6g}", cell)]
    for name, unit in (("parameters", ""), ("kv_bytes_per_token", "B")):
        left, now = found.left(name), getattr(found.sizes.student, name)
        words = "–" if left is None else "unchanged" if left == 1 else f"{left - 1:+.1%}".replace("-", "−")
        cells.append(
            ("" if left is None else f"{left:.6g}", plain_figure(words, f"Counted: {format_number(now, unit)}"))
        )
    if (speed := found.speed) is None:
        return [*cells, ("", "–")]
    sides = speed.teacher.decode_tokens_per_s, speed.student.decode_tokens_per_s
    ratio = shown_ratio(sides[0], sides[1], speed.ratio.decode)
    cell = with_origin(ratio, format_ratio, "Decoding speed, student over teacher, timed in turn")
    return [*cells, (f"{ratio.value:.6g}", cell)]


def _filters(runs: list[Listed]) -> str:
    """A field for text and a list of choices for each of what runs have in common."""
    tags = sorted({tag for run in runs for tag in run.tags})
    choices = {
        "state": [state for state in STATES if any(run.state == state for run in runs)],
        "kind": sorted({run.kind for run in runs}),
        "model": sorted({visible_name(run.model) for run in runs}),
        "tag": tags,
    }
    lists = "".join(
        f'<label>{name.capitalize()} <select data-filter="{name}"><option value="">any</option>'
        + "".join(f'<option value="{escaped(each)}">{escaped(each)}</option>' for each in values)
        + "</select></label>"
        for name, values in choices.items()
        if values or name == "tag"
    )
    return f'<label>Search <input type="search" data-filter="text" autocomplete="off"></label>{lists}'
