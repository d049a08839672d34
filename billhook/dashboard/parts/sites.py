"""What each site is worth and costs, as a table to sort."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping

from billhook.core.plan import Site
from billhook.core.results.measured import Estimate
from billhook.core.results.run import RunResult
from billhook.dashboard.layout import origin
from billhook.dashboard.measured import Measured, alone
from billhook.report.frame import Section, escaped, scrolling
from billhook.report.numbers import format_interval, format_nats, format_number

COLUMNS = ("Site", "In this run", "Parameters", "KV cache / token", "Time / token", "Loss without it", "Loss / ms",
           "Loss / M parameters")  # fmt: skip


def sites_section(measured: Measured, db: sqlite3.Connection) -> Section:
    """Every site with its size, its time where the store has it, and the loss that its removal alone makes."""
    result = measured.result
    losses, times = alone(measured), site_times(db, result)
    rows = "".join(_row(result, size.site, losses.get(size.site), times) for size in result.anatomy.sites)
    words = {0: "", 1: ' data-words=""'}
    head = "".join(
        f'<th scope="col"{words[i < 2]}><button type="button">{name}</button></th>' for i, name in enumerate(COLUMNS)
    )
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    few = len(losses) < len(result.anatomy.sites)
    about = (
        f"Loss without it: {result.loss} of the teacher without this site alone, on {result.data.calibration.tokens:,} "
        "calibration tokens, with its 95% interval over documents"
        + (f"; the search measured that of {len(losses)} of {len(result.anatomy.sites)} sites." if few else ".")
        + (" Time: of a decoding step, measured once, without an interval." if times else
           " No time of a site is in the store: a budget in ms, such as --remove 20%ms, measures it.")
    )  # fmt: skip
    body = scrolling(table, "Sites") + f"<p>{escaped(about)} Parameters and KV cache are counted.</p>"
    return Section("sites", "What each site is worth and costs", f"<details><summary>All {len(result.anatomy.sites)} "
                   f"sites, as a table to sort</summary>{body}</details>")  # fmt: skip


def site_times(db: sqlite3.Connection, result: RunResult) -> dict[str, int]:
    """Nanoseconds of a decoding step that each site takes; empty where they were not measured."""
    own = {str(size.site): size.ns_per_token for size in result.anatomy.sites if size.ns_per_token}
    if own:
        return own
    rows = db.execute("SELECT of, value FROM facts WHERE model = ? AND what = 'ns'", (result.model.fingerprint,))
    for asked, value in rows.fetchall():
        if str(json.loads(asked).get("dtype", "")).startswith(result.model.compute_dtype):
            return {str(site): int(ns) for site, ns in json.loads(value).items()}
    return {}


def _row(result: RunResult, site: Site, loss: Estimate | None, times: Mapping[str, int]) -> str:
    size = next(each for each in result.anatomy.sites if each.site == site)
    ns = times.get(str(site))
    turn = next((number for number, step in enumerate(result.steps, 1) if site in step.sites), None)
    kept = {narrow.site: len(narrow.groups) for narrow in result.plan.narrowed}
    state = "kept"
    if site in result.plan.removed:
        state = f"removed, {turn} of {len(result.steps)}" if turn else "removed"
    elif site in kept:
        state = f"{kept[site]:,} of {len(size.groups):,} groups kept"
    per_ms = loss.value / (ns / 1e6) if loss and ns else None
    per_million = loss.value / (size.parameters / 1e6) if loss and size.parameters else None
    cells: list[tuple[object, str, str]] = [
        (str(site), str(site), ""), (state, state, ""), (size.parameters, format_number(size.parameters), "Counted"),
        (size.kv_bytes_per_token, format_number(size.kv_bytes_per_token, "B"), "Counted"),
        (ns or "", "–" if ns is None else f"{ns / 1e6:.3g} ms", "Measured once, no interval"),
        _loss_cell(result, loss),
        ("" if per_ms is None else per_ms, "–" if per_ms is None else format_nats(per_ms), "The two columns before"),
        ("" if per_million is None else per_million, format_number(per_million), "Loss over parameters"),
    ]  # fmt: skip
    drawn = "".join(
        f'<{"th scope=row" if i == 0 else "td"} data-sort="{escaped(value)}" title="{escaped(about)}">{escaped(text)}'
        f"</{'th' if i == 0 else 'td'}>"
        for i, (value, text, about) in enumerate(cells)
    )
    return f"<tr>{drawn}</tr>"


def _loss_cell(result: RunResult, loss: Estimate | None) -> tuple[object, str, str]:
    if loss is None:
        return "", "–", "Not measured"
    words = f"{format_nats(loss.value)} ({format_interval(loss, format_nats)})"
    return loss.value, words, origin(loss, f"{result.loss} on calibration tokens")
