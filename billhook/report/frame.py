"""What every page shares: escaping, tables, sections and the frame."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

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


def stacked_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML; on narrow screens every row is a list of its cells, with their headings."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    body = ""
    for first, *rest in rows:
        cells = (
            f'<td data-label="{escaped(name)}"><div>{cell}</div></td>'
            for name, cell in zip(head[1:], rest, strict=True)
        )
        body += f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>'
    return f'<table class="stack"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def sortable_table(
    heads: Sequence[tuple[str, str]], lines: Iterable[Sequence[tuple[object, str]]], words: Collection[int] = ()
) -> str:
    """A table that sorts by a press of a heading, (word, small print) each; cells are (what sorts them, text).

    `words`: the numbers of the columns that are sorted as words.
    """
    top = "".join(
        f'<th scope="col"{" data-words" * (i in words)}><button type="button">{escaped(word)}'
        f"{f' <small>{escaped(about)}</small>' if about else ''}</button></th>"
        for i, (word, about) in enumerate(heads)
    )
    body = ""
    for (sort, first), *rest in lines:
        cells = "".join(
            f'<td data-sort="{escaped(key)}"{" class=wrap" * (i in words)}>{escaped(text)}</td>'
            for i, (key, text) in enumerate(rest, 1)
        )
        body += f'<tr><th scope="row" data-sort="{escaped(sort)}">{escaped(first)}</th>{cells}</tr>'
    return f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def scrolling(table: str, label: str, tall: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the screen, and if `tall` where it is taller."""
    kind = "scroll tall" if tall else "scroll"
    return f'<div class="{kind}" role="region" tabindex="0" aria-label="{escaped(label)}">{table}</div>'


def whole_spans(table: str) -> str:
    """A table in which no interval is broken at the end of a line."""
    return re.sub(r"\(.*?\)", r'<span class="span">\g<0></span>', table)


# -- sections and pages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a page. `id`: its anchor; `title`: its heading, which may be empty; `html`: what is below it."""

    id: str
    title: str
    html: str

    def to_html(self) -> str:
        """Return the section with its heading."""
        head = f'<h2 id="{escaped(self.id)}-title">{escaped(self.title)}</h2>' if self.title else ""
        named = f' aria-labelledby="{escaped(self.id)}-title"' if self.title else ""
        return f'<section id="{escaped(self.id)}"{named}>{head}{self.html}</section>'


def caption(text: str) -> str:
    """A paragraph below a table; nothing without text."""
    return f'<p class="caption">{escaped(text)}</p>' if text else ""


def details(summary: str, html: str) -> str:
    """Something to open."""
    return f"<details><summary>{escaped(summary)}</summary>{html}</details>"


def note_lines(notes: Iterable[str]) -> str:
    """Notes as paragraphs, each once."""
    return "".join(f'<p class="note">{escaped(note)}</p>' for note in dict.fromkeys(notes))


def asset(name: str) -> str:
    """The text of a file that pages share: style.css, charts.js, pages.js, echarts.min.js."""
    return files("billhook.report").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def page_html(
    title: str, made: str, headline: str, notes: Iterable[str], sections: Iterable[Section], *, lead: str = ""
) -> str:
    """One self-contained page. `made`: by what and where; `headline`: the finding in a sentence; `lead`: HTML below it.

    Every text but the HTML of the sections is escaped here. ECharts is on the page where there is a chart.
    """
    body = "".join(section.to_html() for section in sections if section.html)
    scripts = ["echarts.min.js", "charts.js"] if 'class="plot"' in body else []
    frame = Template(files("billhook.report").joinpath("templates").joinpath("page.html").read_text(encoding="utf-8"))
    return frame.substitute(
        title=escaped(title),
        made=escaped(made),
        verdict=escaped(headline),
        notes=lead + note_lines(notes),
        body=body,
        style=asset("style.css"),
        scripts="\n".join(f"<script>{asset(name)}</script>" for name in [*scripts, "pages.js"]),
    )
