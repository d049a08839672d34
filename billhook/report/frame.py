"""What every page shares: escaping, tables, charts and the frame."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

# -- words -------------------------------------------------------------------------------------------------------------


def readable_value(value: object) -> str:
    """A value of a recipe, of data or of the environment, for readers."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def yaml_lines(values: Mapping[str, object]) -> str:
    """One `key: value` line each, the value as JSON, which YAML reads; what cannot be printed is escaped."""
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return "\n".join("".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in line) for line in lines)


def markdown(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(str(value).split()))


def escaped(value: object) -> str:
    """A value as text for HTML."""
    return html.escape(str(value))


def html_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Headings on top and on the left; every cell escaped."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in lines
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def scrolling(table: str, label: str) -> str:
    """A table that scrolls by itself where it is wider than the screen."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(label)}">{table}</div>'


def whole_spans(table: str) -> str:
    """A table in which no interval is broken at the end of a line."""
    return re.sub(r"\(.*?\)", r'<span class="span">\g<0></span>', table)


def chart(kind: str, title: str, label: str, caption: str, numbers: Mapping[str, list[Any]]) -> str:
    """A figure that report.html draws from `numbers`; `label` tells a screen reader what is to be seen."""
    height = {"loss": 420, "speed": 230}[kind]
    finite = {k: [None if isinstance(x, float) and not math.isfinite(x) else x for x in v] for k, v in numbers.items()}
    box = f'class="chart" data-kind="{kind}" style="height:{height}px" data-numbers="{escaped(json.dumps(finite))}"'
    return (
        f'<section class="{kind}"><h2>{escaped(title)}</h2><div role="img" aria-label="{escaped(label)}" {box}></div>'
        f"<p>{escaped(caption)}</p></section>"
    )


def page_html(title: str, made: str, headline: str, notes: Iterable[str], body: Iterable[str]) -> str:
    """One self-contained page of sections. `made`: by what and where; `headline`: the finding in one sentence.

    `body`: sections as HTML; every other text is escaped here. The page has the style of a run's page.
    """
    templates = files("billhook.report").joinpath("templates")
    head = templates.joinpath("run.html").read_text(encoding="utf-8").partition("</style>")[0]
    return Template(head + templates.joinpath("compare.html").read_text(encoding="utf-8")).substitute(
        title=escaped(title),
        made=escaped(made),
        verdict=escaped(headline),
        notes="".join(f'<p class="note">{escaped(note)}</p>' for note in dict.fromkeys(notes)),
        body="".join(body),
    )
