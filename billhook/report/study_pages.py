"""The laboratory, told: one self-contained HTML page each for a sweep, a trade and a stability study.

Nothing is measured here: every number comes from the result, a plain JSON object. The pages have the head of the run's
page (style, icon, a Content-Security-Policy that forbids every request) and escape every string of the result. What
they draw with is in lab.html.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from billhook.core.plan import PARTS, Plan, Site
from billhook.report.curves import curves_of, key_of, looks_of, numbers_of
from billhook.report.frame import html_table, scrolling
from billhook.report.numbers import (
    about_tokens,
    format_accuracy,
    format_correlation,
    format_duration,
    format_interval,
    format_interval_short,
    format_nats,
    format_number,
    format_perplexity,
    format_points,
    format_share,
    how_many,
    pluralize,
    printable,
)
from billhook.report.study_words import (
    Result,
    fraction_kept,
    peers,
    rank_label,
    reliability_notes,
    removal_counts,
    short_names,
    sizes_of,
    sorted_rows,
    stability_headline,
    sweep_headline,
    tasks_of,
    texts_of,
    transfer_headline,
)

# -- the frame ---------------------------------------------------------------------------------------------------------


def _page(kind: str, result: Result, words: tuple[str, str, Sequence[str]], body: Iterable[str], draws: bool) -> str:
    """The head of the run's page, and the rest of lab.html. `words`: title, verdict, notes; `body`: HTML."""
    title, verdict, notes = words
    house = files("billhook.report").joinpath("templates")
    head = house.joinpath("run.html").read_text(encoding="utf-8").partition("</style>")[0]
    made = [
        "Billhook",
        kind,
        *(f"{key} {printable(result[key])}" for key in ("fingerprint", "remove") if key in result),
    ]
    return Template(head + house.joinpath("study.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        kind=kind,
        made=escape(" · ".join(made)),
        verdict=escape(verdict),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        body="".join(body),
        plotly=get_plotlyjs() if draws else "",
    )


def _section(title: str, body: str, caption: str = "") -> str:
    told = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(title)}</h2>{body}{told}</section>"


def _json(value: object) -> str:
    return escape(json.dumps(value, allow_nan=False))


def _sets(about: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """A table of token sets: (use, description) each."""
    keys = ("tokens", "documents", "texts", "items")
    told = [(use, each, [about_tokens(each).get(key) for key in keys]) for use, each in about]
    lines = [(use, printable(each["source"]), *("–" if n is None else f"{n:,}" for n in ns)) for use, each, ns in told]
    return html_table(("Use", "Source", *(key.capitalize() for key in keys)), lines)


# -- the page of a sweep -----------------------------------------------------------------------------------------------


def sweep_page(result: Result) -> str:
    """One page of a sweep: losses and accuracies against what is left, all rows, what was refused, how."""
    recipes = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    tried = {*recipes, *(each["recipe"] for each in result["refused"])}
    drawn = ""
    if recipes:
        looks = looks_of(recipes)
        charts = [curves_of(result, kind) for kind in ("perplexity", "accuracy")]
        numbers = _json(numbers_of(result, looks))
        drawn = f'<div id="curves" data-numbers="{numbers}">{key_of(result, looks).join(charts)}</div>'
    body = [drawn, _all_rows(result) if recipes else "", _refused(result), _how(result)]
    title = f"{printable(result['model'])}: {pluralize(len(tried), 'recipe')}{' compared' if len(tried) > 1 else ''}"
    return _page("sweep", result, (title, sweep_headline(result), reliability_notes(result)), body, bool(drawn))


def _all_rows(result: Result) -> str:
    """The table of all rows, sortable by every column; at first by size, calibration text and loss."""
    texts, tasks, names = texts_of(result), tasks_of(result), short_names(result["teacher"])
    heads = [("Recipe", ""), ("Calibrated on", ""), ("Size asked", "")]
    heads += [("Left", words) for words in sizes_of(result).values()]
    heads += [("Attention", "removed"), ("MLP", "removed")]
    for text in texts:
        heads += [("Perplexity", names[text]), ("Above the best, nats", names[text])]
    heads += [("Accuracy", names[task]) for task in tasks] + [("Search", "time"), ("Site evaluations", "")]
    top = "".join(_heading(word, about, about in names.values(), i < 3) for i, (word, about) in enumerate(heads))
    body = "".join(_sweep_row(result, row) for row in sorted_rows(result))
    table = f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    caption = (
        "Below each value: its 95% interval. Above the best: the paired difference to the lowest loss of the same size "
        "and calibration text; not told apart: its interval includes 0. Each interval stands for itself: of many, "
        "about one in twenty misses. Bold: on the Pareto front by parameters. Press a heading to sort."
    )
    return _section("All results", scrolling(table, "All results"), caption)


def _heading(word: str, about: str, file: bool, words: bool) -> str:
    """A heading that sorts; `words`: its column holds words."""
    kind = ' class="file"' if file else ""
    small = f" <small{kind}>{escape(about)}</small>" if about else ""
    return f'<th scope="col"{" data-words" * words}><button type="button">{escape(word)}{small}</button></th>'


def _sweep_row(result: Result, row: Result) -> str:
    recipe, data, remove = (
        printable(row["recipe"]),
        short_names(r["data"] for r in result["rows"])[row["data"]],
        row["remove"],
    )
    cells = [_cell(data, data), _cell(printable(remove), printable(remove))]
    cells += [_cell(share, f"{share:.1%}") for share in (fraction_kept(result, row, size) for size in sizes_of(result))]
    cells += [_cell(row[part], str(row[part])) for part in PARTS]
    for text in texts_of(result):
        told, gap = row["results"][text], row["results"][text]["above_best"]
        cells.append(
            _cell(told["value"], format_perplexity(told["value"]), format_interval_short(told, format_perplexity))
        )
        state = rank_label(gap) if peers(result, row) > 1 else "alone"
        far = _cell(gap["value"], format_nats(gap["value"]), format_interval(gap, format_nats), state)
        cells.append({"best": _BEST, "alone": _cell(0, "–")}.get(state, far))
    cells += [_interval_cell(row["results"][task]) for task in tasks_of(result)]
    cells.append(_cell(row["search_seconds"], format_duration(row["search_seconds"])))
    cells.append(_cell(row["site_evaluations"], format_number(row["site_evaluations"])))
    front = ' class="front"' if "parameters" in row["front"] else ""
    return f'<tr{front}><th scope="row" data-sort="{escape(recipe)}">{escape(recipe)}</th>{"".join(cells)}</tr>'


_BEST = '<td data-sort="0"><b class="best">best</b></td>'


def _cell(sort: object, words: str, about: str = "", remark: str = "") -> str:
    """A cell: what it is sorted by, what it says, its interval and a remark."""
    mark = f" <i>{remark}</i>" if remark else ""
    small = f"<small>{escape(about)}</small>" if about else ""
    return f'<td data-sort="{escape(str(sort))}">{escape(words)}{mark}{small}</td>'


def _interval_cell(interval: Mapping[str, float]) -> str:
    return _cell(
        interval["value"], format_accuracy(interval["value"]), format_interval_short(interval, format_accuracy)
    )


def _refused(result: Result) -> str:
    datas = short_names(each["data"] for each in result["refused"])
    lines = [
        (printable(each["recipe"]), printable(each["remove"]), datas[each["data"]], printable(each["why"]))
        for each in result["refused"]
    ]
    if not lines:
        return ""
    table = html_table(("Recipe", "Size asked", "Calibrated on", "Why"), lines)
    return _section("Refused", f'<div class="why">{table}</div>')


def _how(result: Result) -> str:
    """Teacher, texts and tasks with their sizes, calibration, timing."""
    names = short_names(result["teacher"])
    lines = []
    for name, told in result["teacher"].items():
        spell = format_perplexity if told["kind"] == "perplexity" else format_accuracy
        lines.append((names[name], told["kind"], spell(told["value"]), format_interval(told, spell)))
    teacher = html_table(("Measured on", "Kind", "Teacher", "95% interval"), lines)
    sets = [(f"measured on {names[name]}", each) for name, each in result["evaluation"].items()]
    sets += [("calibration", each) for each in result["calibration"]]
    timing = "Time per token was not measured."
    if result["sizes"]["ns_per_token"]:
        timing = (
            f"Time per token: measured site by site, {pluralize(result['batch'], 'sequence')} at a time, "
            f"{result['context']:,} tokens before the one that is timed."
        )
    caption = (
        "Calibration and held-out documents are never the same. All rows are measured on the same held-out documents, "
        f"so that differences are paired; intervals resample whole texts, or items of a task. {timing}"
    )
    return _section("How it was measured", f"{teacher}<h3></h3>{scrolling(_sets(sets), 'Token sets')}", caption)


# -- the page of a trade -----------------------------------------------------------------------------------------------


def transfer_page(result: Result) -> str:
    """One page of a trade: pruned for (rows) against measured on (columns), against the teacher and against text."""
    rows = result["rows"]
    pale = "Pale: the 95% interval includes 0. Framed: measured on the task that it was pruned for."
    teacher = _heat(rows, lambda told: (told["change"], told["change_low"], told["change_high"]))
    text = _heat(rows[1:], lambda told: tuple(told["against_text"][key] for key in ("value", "low", "high")))
    sets = _sets((printable(name), each) for name, each in result["evaluation"].items())
    body = [
        _section(
            "Accuracy against the teacher",
            teacher,
            f"Change in percentage points, with its paired 95% interval; orange: worse, blue: better. {pale}",
        ),
        _section(
            "Against pruning on text", text, f"The same, against the first row of the table above. {pale}"
        ) if len(rows) > 1 else "",
        _accuracies(result),
        _section(
            "How it was measured", scrolling(sets, "Token sets"),
            "Items that a search looks at are never measured. Differences are paired, item by item.",
        ),
    ]  # fmt: skip
    title = f"{printable(result['model'])}: pruned for one task, measured on another"
    return _page("trade", result, (title, transfer_headline(result), reliability_notes(result)), body, False)


def _heat(rows: Sequence[Result], change: Callable[[Result], tuple[float, ...]]) -> str:
    """A cell a pair, as deep in colour as the change is large."""
    most = max((abs(change(told)[0]) for row in rows for told in row["results"].values()), default=0) or 1
    top = "".join(f'<th scope="col">{escape(printable(name))}</th>' for name in rows[0]["results"]) if rows else ""
    body = ""
    for row in rows:
        body += f'<tr><th scope="row">{escape(printable(row["pruned_for"]))}</th>'
        for name, told in row["results"].items():
            value, low, high = change(told)
            kinds = ["worse" if value < 0 else "better"] + ["pale"] * (low <= 0 <= high)
            kinds += ["own"] * (name == row["pruned_for"])
            depth = f"{10 + 50 * abs(value) / most:.0f}%"
            ends = format_interval({"low": low, "high": high}, format_points)
            body += f'<td class="{" ".join(kinds)}" style="--depth:{depth}">{format_points(value)}<small>{ends}</small></td>'
        body += "</tr>"
    head = f"<thead><tr><th>pruned for ↓<br>measured on →</th>{top}</tr></thead>"
    return scrolling(f'<table class="heat">{head}<tbody>{body}</tbody></table>', "pruned for, measured on")


def _accuracies(result: Result) -> str:
    """Plain accuracies, the teacher's first, and what every row removed."""
    heads = (
        "Pruned for",
        *map(printable, result["teacher"]),
        "Attention removed",
        "MLP removed",
        "Parameters",
        "Search time",
    )
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = f'<tr><th scope="row">the teacher</th>{"".join(map(_interval_cell, result["teacher"].values()))}'
    body += f"{'<td>–</td>' * 4}</tr>"
    for row in result["rows"]:
        body += f'<tr><th scope="row">{escape(printable(row["pruned_for"]))}</th>'
        body += "".join(_interval_cell(row["results"][name]) for name in result["teacher"])
        ends = [
            *(str(row[part]) for part in PARTS),
            format_number(row["sizes"]["parameters"]),
            format_duration(row["search_seconds"]),
        ]
        body += "".join(f"<td>{end}</td>" for end in ends) + "</tr>"
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return _section("Accuracies", scrolling(table, "Accuracies"), "Below each value: its 95% interval.")


# -- the page of a study of stability ----------------------------------------------------------------------------------


def stability_page(result: Result) -> str:
    """One page of a study of stability: agreement against calibration size, and the sites behind it."""
    sizes = sorted(result["sizes"], key=lambda told: told["tokens"])
    numbers: dict[str, list[float]] = {"tokens": [told["tokens"] for told in sizes]}
    for key in ("rank_correlation", "overlap"):
        numbers |= {f"{key}_{end}": [told[key][end] for told in sizes] for end in ("mean", "low", "high")}
    label = "rank correlation and plan overlap against calibration tokens; the table below has the numbers"
    drawn = f'data-kind="stability" data-numbers="{_json(numbers)}"'
    box = f'<div class="chart" role="img" aria-label="{label}" {drawn}></div>'
    lines, sites = [], []
    for told in sizes:
        ranks, overlap, votes = told["rank_correlation"], told["overlap"], removal_counts(told)
        always = [site for site, n in votes.items() if n == told["sets"]]
        some = {site: n for site, n in votes.items() if n < told["sets"]}
        pairs = told["sets"] * (told["sets"] - 1) // 2
        cells = (
            f"{format_correlation(ranks['mean'])} ({format_interval(ranks, format_correlation)})",
            f"{format_share(overlap['mean'])} ({format_interval(overlap, format_share)})",
        )
        lines.append((f"{told['tokens']:,}", str(told["sets"]), str(pairs), *cells, str(len(always)), str(len(some))))
        sites.append((f"{told['tokens']:,}", _parts(dict.fromkeys(always, 0)), _parts(some)))
    heads = ("Tokens", "Sets", "Pairs", "Rank correlation", "Overlap of plans", "Sites in all plans", "In some")
    body = [
        f'<section class="curves"><h2>Agreement of calibration sets</h2>{box}<p>Dots: mean over all pairs of sets; '
        "bars: lowest and highest pair. Rank correlation (Spearman) is of the scores of all sites; overlap is what two "
        "plans share of all that either removes.</p></section>",
        _section(
            "In numbers", scrolling(html_table(heads, lines), "In numbers"), "In brackets: lowest to highest pair."
        ),
        _section(
            "Which sites go",
            f"{_votes(sizes)}<details><summary>The same as a table</summary>"
            f"{html_table(('Tokens', 'In all plans', 'In some plans (in how many)'), sites)}</details>",
        ),
        _section("How it was measured", html_table(("", ""), _stability_conditions(result))),
    ]
    title = f"{printable(result['model'])}: how far {printable(result['metric'])} can be trusted"
    return _page("stability", result, (title, stability_headline(result), []), body, True)


def _parts(votes: Mapping[str, int]) -> str:
    """`attention 2, 4 (3); mlp 16`: sites and, where it is not 0, their number of plans."""
    told: dict[str, list[str]] = {}
    for site, n in votes.items():
        part, block = site.split(".")
        told.setdefault(part, []).append(f"{block} ({n})" if n else block)
    return "; ".join(f"{part} {', '.join(blocks)}" for part, blocks in sorted(told.items())) or "none"


def _stability_conditions(result: Result) -> list[tuple[str, str]]:
    data = result["data"]
    about = f"{printable(data['source'])}: {data['tokens']:,} tokens, {how_many(data)}"
    told = {"Metric": result["metric"], "Search": result["search"], "Size asked": result["remove"]}
    return [
        *((key, printable(value)) for key, value in told.items()),
        ("Calibration", f"{about}; no two sets share {'a document' if data.get('items') is None else 'an item'}"),
    ]


def _votes(sizes: Sequence[Result]) -> str:
    """Blocks from left to right, ten to a table; a row a part and calibration size, as deep as plans agree."""
    votes = [removal_counts(told) for told in sizes]
    last = max((site.block for each in votes for site in Plan.parse(each).sites()), default=0)
    told = []
    for start in range(0, last + 1, 10):
        blocks = range(start, min(start + 10, last + 1))
        lines = f"<tr><th>block</th>{''.join(f'<th scope=col>{block}</th>' for block in blocks)}</tr>"
        for part in PARTS:
            lines += f'<tr class="part"><th colspan="{len(blocks) + 1}">{part}</th></tr>'
            for size, each in zip(sizes, votes, strict=True):
                lines += f"<tr><th scope=row>{size['tokens']:,}</th>"
                for name in (str(Site(block, part)) for block in blocks):
                    n = each.get(name, 0)
                    about = f"{name}: in {n} of {size['sets']} plans with {size['tokens']:,} tokens"
                    kind = "none" if not n else "all" if n == size["sets"] else "some"
                    depth = f"{100 * n / size['sets']:.0f}%"
                    lines += f'<td><i class="{kind}" style="--depth:{depth}" title="{about}">{n or ""}</i></td>'
                lines += "</tr>"
        told.append(f'<table style="--n:{len(blocks)}">{lines}</table>')
    caption = f"In how many plans each site is removed, a row for each number of tokens. After block {last}: none."
    return f'<div class="map long votes">{"".join(told)}</div><p>{caption}</p>'
