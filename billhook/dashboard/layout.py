"""The frame of a live page, and the small parts that several of them have."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from urllib.parse import quote, urlencode

from billhook.core.results.measured import Estimate
from billhook.report.frame import escaped
from billhook.report.numbers import format_interval, pluralize, reliability_note, visible_name

FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title · Billhook</title>
<link rel="icon" href="/assets/icon.svg">
<link rel="stylesheet" href="/shared/style.css">
<link rel="stylesheet" href="/assets/dashboard.css">
$scripts<script src="/shared/pages.js" defer></script>
<script src="/assets/dashboard.js" defer></script>
</head>
<body$events>
<a class="skip" href="#main">To the content</a>
<nav aria-label="Pages"><a class="brand" href="/">Billhook</a>$links<span class="store" title="$place">$store</span>
<output id="line" aria-live="polite"></output></nav>
<main id="main">
$body
</main>
<div id="tip" role="tooltip" hidden></div>
</body>
</html>
""")
CHARTS = '<script src="/shared/echarts.min.js" defer></script>\n<script src="/shared/charts.js" defer></script>\n'
LINKS = (("/", "Runs"), ("/compare", "Compare"), ("/explore", "Explorer"))


def page_html(title: str, store: Path, body: str, *, here: str = "", events: str = "", charts: bool = True) -> str:
    """A page of the dashboard. `body`: HTML; `here`: which link of the menu it is; `events`: where its news come from.

    A page without `charts` does not load what draws them.
    """
    links = "".join(
        f'<a href="{address}"{" aria-current=page" if address == here else ""}>{words}</a>' for address, words in LINKS
    )
    return FRAME.substitute(
        title=escaped(title), store=escaped(visible_name(store.name)), place=escaped(visible_name(store)),
        body=body, links=links,
        scripts=CHARTS if charts else "", events=f' data-events="{escaped(events)}"' if events else "",
    )  # fmt: skip


def problem_page(store: Path, message: str) -> str:
    """A page that says what is wrong."""
    body = f'<h1>This cannot be shown</h1><p class="verdict">{escaped(message)}</p><p><a href="/">All runs</a></p>'
    return page_html("Problem", store, body, charts=False)


def run_address(run: str) -> str:
    """The address of the page of a run."""
    return f"/runs/{quote(run, safe='')}"


def compare_address(runs: list[str]) -> str:
    """The address of the page that compares runs."""
    return f"/compare?{urlencode([('run', run) for run in runs])}"


def when(seconds: float) -> str:
    """A time since 1970 as HTML, in UTC."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f'<time datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%Y-%m-%d %H:%M} UTC</time>'


def origin(estimate: Estimate | None, what: str) -> str:
    """Where a figure comes from, with n and the kind of its interval, or that it has none."""
    if estimate is None:
        return f"{what}: no interval"
    over = pluralize(estimate.n, "value") if estimate.n == estimate.clusters else (
        f"{pluralize(estimate.n, 'value')} from {pluralize(estimate.clusters, 'text')}"
    )  # fmt: skip
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    interval = "95% interval" if known else "the interval is not known"
    return f"{what}: {interval}, n = {over}. {reliability_note(estimate)}".rstrip()


def with_origin(estimate: Estimate, spell: Callable[[float], str], what: str) -> str:
    """An estimate with its interval as HTML; what it rests on is its title."""
    doubt = "" if estimate.reliable else ' class="few"'
    return (
        f'<span title="{escaped(origin(estimate, what))}"{doubt}>{escaped(spell(estimate.value))} '
        f'<small class="span">({escaped(format_interval(estimate, spell))})</small></span>'
    )


def plain_figure(text: str, what: str) -> str:
    """A figure that is counted or has no interval, as HTML, which its title says."""
    return f'<span title="{escaped(what)}">{escaped(text)}</span>'


def command_html(command: str) -> str:
    """A command with a button that copies it."""
    return f'<div class="command"><pre>{escaped(visible_name(command))}</pre><button type="button">copy</button></div>'
