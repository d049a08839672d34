"""The token sets of a study as a table."""

from __future__ import annotations

from collections.abc import Iterable

from billhook.core.results.measured import TokenSetInfo
from billhook.report.frame import html_table
from billhook.report.numbers import printable, token_facts


def sets_table(infos: Iterable[tuple[str, TokenSetInfo]]) -> str:
    """A line for each set: its use, its source, and its counts."""
    keys = ("tokens", "documents", "texts", "items")
    lines = []
    for use, info in infos:
        counts = (token_facts(info).get(key) for key in keys)
        lines.append((use, printable(info.source), *("–" if n is None else f"{n:,}" for n in counts)))
    return html_table(("Use", "Source", *(key.capitalize() for key in keys)), lines)
