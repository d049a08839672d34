"""The page that says what a budget would cost and save before anything is run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from billhook.core.outlook.machines import HERE, machine, machines
from billhook.core.outlook.roofline import Workload
from billhook.core.results.run import RunResult
from billhook.core.results.stored import read_result
from billhook.dashboard.layout import page_html
from billhook.dashboard.listing import Listed, Listing, opened, stamp
from billhook.dashboard.measured import Measured, Stop, enriched, stops_of
from billhook.dashboard.outlooks import UNITS, amounts, known_of, machine_here, needs_at, predicted, share_at
from billhook.dashboard.parts.forecast import better_runs, curve_figure, forecast_words, needs_table
from billhook.report.frame import Section, escaped
from billhook.report.numbers import visible_name

if TYPE_CHECKING:
    from starlette.requests import Request

WIDTHS = {"": "as in the checkpoint", "2": "16 bits", "1": "8 bits", "0.5": "4 bits"}
DEFAULT_MACHINE = "rtx-4090"
LARGEST = {"context": 10**7, "batch": 10**5}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the form asks. `amount`: of the unit, removed; None: as much as the run."""

    unit: str
    amount: float | None
    machine: str
    workload: Workload
    width: str


def explore_page(listing: Listing, request: Request) -> str:
    """A slider for the budget of a run's recipe, with what it would cost and save."""
    runs = listing.runs()
    able = [run for run in runs if run.figures and run.figures.perplexity]
    query = request.query_params
    if not able:
        words = "No pruning with a perplexity has finished yet, so there is nothing to forecast from. Start one:"
        body = f"<h1>Explorer</h1><p>{words} <code>billhook prune --remove 10%</code></p>"
        return page_html("Explorer", listing.store, body, here="/explore", charts=False)
    chosen = next((run for run in able if run.id == query.get("run")), able[0])
    body = _body(listing, able, chosen, _asked(query))
    return page_html("Explorer", listing.store, body, here="/explore")


def _asked(query: Mapping[str, str]) -> Asked:
    """The form's values; what cannot be read is left at its default."""
    amount = _number(query.get("amount", ""), math.inf)
    context, batch = (_number(query.get(name, ""), most) for name, most in LARGEST.items())
    width = query.get("width", "") if query.get("width", "") in WIDTHS else ""
    each = float(width) if width else None
    workload = Workload(int(context or 2048), int(batch or 1), min(512, int(context or 512)), each)
    unit = query.get("unit", "")
    name = query.get("machine", "")
    return Asked(
        unit if unit in UNITS else "parameters",
        amount,
        name if name in machines() or name == HERE else DEFAULT_MACHINE,
        workload,
        width,
    )


def _number(text: str, most: float) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < most and math.isfinite(value) else None


def _body(listing: Listing, able: Sequence[Listed], chosen: Listed, asked: Asked) -> str:
    with opened(listing.store) as db:
        (text,) = db.execute("SELECT result FROM runs WHERE id = ?", (chosen.id,)).fetchone()
        result = read_result(chosen.kind, json.loads(text))
        assert isinstance(result, RunResult)
        whole = enriched(db, Measured(db, result))
        stops = stops_of(Measured(db, whole))
        here = machine_here(db)
    known = known_of(listing.store, chosen.id, stamp(listing.runs()))
    assert known is not None
    at = amounts(stops, asked.unit)
    amount = at[-1] if asked.amount is None else asked.amount
    share = share_at(stops, asked.unit, amount)
    places = [*([HERE] if here else []), *machines()]
    form = _form(able, chosen, asked, (amount, _most(stops, asked.unit)), places)
    if share is None or share >= 0.95:
        why = (
            f"The path of {chosen.id} removes no {UNITS[asked.unit].removeprefix('% of the ')}: choose another unit."
            if share is None
            else "Nothing would be left of the model. Choose less."
        )
        return f'<h1>Explorer</h1>{form}<div id="forecast"><p class="note">{escaped(why)}</p></div>'
    found = predicted(known, share)
    place = machine(asked.machine if here or asked.machine != HERE else DEFAULT_MACHINE, here)
    quality = forecast_words(known, share, found) + curve_figure(known, share, stops)
    needs = needs_table(whole, place, *needs_at(whole, stops, share, place, asked.workload))
    sections = [
        Section("quality", "Perplexity", quality),
        Section("needs", "Size, memory and speed", needs),
        Section("better", "A better way to spend it", better_runs(able, chosen, share, found)),
    ]
    drawn = "".join(section.to_html() for section in sections)
    return f'<h1>Explorer</h1>{form}<div id="forecast">{drawn}</div>'


def _most(stops: Sequence[Stop], unit: str) -> float:
    """The end of the slider: half as much again as the path, at least 30%, at most 90%; of sites all but a few."""
    last = amounts(stops, unit)[-1]
    if unit == "sites":
        return float(max(4, round(2 * last)))
    return min(90.0, max(30.0, math.ceil(1.5 * last)))


def _form(
    able: Sequence[Listed], chosen: Listed, asked: Asked, slider: tuple[float, float], places: Sequence[str]
) -> str:
    amount, most = slider
    named = {run.id: f"{run.id} {visible_name(run.model)} {visible_name(run.remove)}" for run in able}
    step = 1 if asked.unit == "sites" else 0.5
    fields = [
        _choice("run", "As in run", named, chosen.id),
        _choice("unit", "Budget in", UNITS, asked.unit),
        f'<label class="wide">Removed <output>{amount:g}</output><input type="range" name="amount" min="0" '
        f'max="{max(most, amount):g}" step="{step}" value="{amount:g}"></label>',
        _choice("machine", "Machine", {name: name for name in places}, asked.machine),
        _choice("width", "Weights in", WIDTHS, asked.width),
        f'<label>Context <input type="number" name="context" min="1" value="{asked.workload.context}"></label>',
        f'<label>Batch <input type="number" name="batch" min="1" value="{asked.workload.batch}"></label>',
        '<button type="submit">Show</button>',
    ]
    return f'<form action="/explore" data-send="forecast" class="filters explore">{"".join(fields)}</form>'


def _choice(name: str, label: str, options: Mapping[str, str], chosen: str) -> str:
    listed = "".join(
        f'<option value="{escaped(value)}"{" selected" if value == chosen else ""}>{escaped(words)}</option>'
        for value, words in options.items()
    )
    return f'<label>{label} <select name="{name}">{listed}</select></label>'
