"""The page of one run: what it does while it runs, and what it found when it has ended."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from billhook.core.errors import ResultError, RunError, nearest
from billhook.core.files.foreign_files import reading
from billhook.core.results.json_form import JsonObject, Result
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import read_result
from billhook.dashboard.commands import prune_command
from billhook.dashboard.layout import command_html, page_html, when
from billhook.dashboard.listing import Listed, Listing, Parts, opened, seen_in, stamp
from billhook.dashboard.outlooks import end_of_search
from billhook.dashboard.parts.cost import cost_section
from billhook.dashboard.parts.found import found_parts
from billhook.dashboard.parts.status import age, gone_so_far, rounds_figure, stage_words, status_line
from billhook.dashboard.progress import Progress, progress_of
from billhook.report.frame import Section, escaped
from billhook.report.numbers import visible_name
from billhook.report.outlook.words import search_sentences

if TYPE_CHECKING:
    from starlette.requests import Request


def run_page(listing: Listing, request: Request) -> str:
    """One run by its id. Raises RunError for one that the store has not."""
    name, runs = str(request.path_params["run"]), listing.runs()
    run = next((each for each in runs if each.id == name), None)
    if run is None:
        near = nearest(name, [each.id for each in runs])
        raise RunError(
            f"There is no run {visible_name(name[:60])} in {listing.store}."
            + (f" Did you mean {near}?" if near else "")
        )
    events = f"/events/{run.id}?since={seen_in(runs)}"
    return page_html(f"Run {run.id}", listing.store, _whole(listing, run), events=events)


def parts(listing: Listing, name: str, changed: Iterable[Listed]) -> Parts:
    """What changes on the page of a run: where it is while it runs; everything once it has a result."""
    run = next((each for each in changed if each.id == name), None)
    if run is None:
        return {}
    if run.finished:
        return {"run": _whole(listing, run)}
    with opened(listing.store) as db:
        return {"status": _status(run, progress_of(db, listing.store, run.id), listing)}


def _whole(listing: Listing, run: Listed) -> str:
    tags = "".join(f'<span class="tag">{escaped(visible_name(tag))}</span>' for tag in run.tags)
    head = (
        f'<p class="made">{escaped(visible_name(run.id))} · {escaped(run.kind)} · {escaped(visible_name(run.model))} · '
        f"begun {when(run.created)} · "
        f'<span class="state {run.state}">{run.state}</span> {tags}</p>'
    )
    with opened(listing.store) as db:
        row = db.execute("SELECT recipe, result FROM runs WHERE id = ?", (run.id,)).fetchone()
        spec, result = json.loads(row["recipe"]), _result(run, row["result"])
        found = progress_of(db, listing.store, run.id)
        if result is None:
            title = f"{run.kind} of {visible_name(run.model)}"
            body = f"<h1>{escaped(title)}</h1>{_status(run, found, listing)}"
            sections = [Section("asked", "What was asked", _asked(run, spec, listing))]
        else:
            verdict, sections = found_parts(db, listing.store, run, result)
            body = f"{verdict}"
        sections.append(cost_section(db, run, found))
    text = "".join(each.to_html() for each in sections if each.html)
    return f'<div id="run">{head}{body}{text}</div>'


def _result(run: Listed, text: str | None) -> Result | JsonObject | None:
    if text is None:
        return None
    with reading(f"The result of run {run.id} cannot be read", ResultError, "Run the command again."):
        return read_result(run.kind, json.loads(text))


def _status(run: Listed, found: Progress | None, listing: Listing) -> str:
    """Where a run without a result is."""
    if found is None:
        inner = "<p>It has not begun to measure.</p>"
    else:
        resume = shlex.join(["billhook", "prune", "--resume", "--run", run.id, "--store", str(listing.store)])
        shown = shlex.join(["billhook", "show", run.id, "--store", str(listing.store)])
        more = f" This is attempt {found.attempts}." if found.attempts > 1 else ""
        words = {
            "running": f"Running for {age(found.began)}; last event {age(found.now.at)} ago.{more}",
            "interrupted": f"Interrupted while {stage_words(found.now.stage)}. Nothing that was measured is lost. To "
            f"resume it: <code>{escaped(resume)}</code>",
            "failed": f"Failed while {stage_words(found.now.stage)}. Its events: <code>{escaped(shown)}</code>",
        }.get(run.state, "Ended without a result.")
        line = status_line(found) if run.state == "running" else ""
        if run.state == "running" and found.now.stage in ("search", "round", "score"):
            line += _end_of_search(listing, run)
        inner = f"<p>{words}</p>{line}{gone_so_far(found)}{rounds_figure(found)}"
    state = f'<p class="verdict"><span class="state {run.state}">{run.state}</span></p>'
    return f'<div id="status" class="status" data-state="{run.state}">{state}{inner}</div>'


def _end_of_search(listing: Listing, run: Listed) -> str:
    """When the search will end, in sentences with what they rest on; nothing where it has hardly begun."""
    forecast = end_of_search(listing.store, run.id, stamp(listing.runs()))
    return "" if forecast is None else f"<p>{escaped(' '.join(search_sentences(forecast)))}</p>"


def _asked(run: Listed, spec: JsonObject, listing: Listing) -> str:
    if run.kind == PRUNE:
        return command_html(prune_command(spec, listing.store))
    items = "".join(
        f"<li>{escaped(name)}: {escaped(visible_name(json.dumps(value)))}</li>" for name, value in spec.items()
    )
    return f"<ul>{items}</ul>"
