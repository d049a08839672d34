"""Studies as HTML: one self-contained page each for a sweep, a transfer and a stability study.

Nothing is measured here: every number comes from the result. The pages have the head of the run's page (style, icon, a
Content-Security-Policy that forbids every request) and escape every string of the result. Their script, which draws the
charts, is in study.html.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from plotly.offline import get_plotlyjs

from billhook.core.plan import PARTS, Site
from billhook.core.results.measured import Estimate, TokenSetInfo
from billhook.core.results.studies import StabilityResult, StabilitySize, SweepResult, TransferResult, TrialResult
from billhook.report.curves import curves_of, key_of, looks_of, numbers_of
from billhook.report.frame import html_table, scrolling
from billhook.report.numbers import (
    count_items,
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
    pluralize,
    printable,
    token_facts,
)
from billhook.report.pages import page
from billhook.report.study_words import (
    gap_to_best,
    gap_to_text,
    known_fraction,
    peers,
    rank_label,
    reliability_notes,
    removal_counts,
    removed_words,
    short_names,
    sizes_of,
    sorted_trials,
    stability_headline,
    sweep_headline,
    tasks_of,
    texts_of,
    transfer_headline,
)

# -- the frame ---------------------------------------------------------------------------------------------------------


def _page(kind: str, fact: str, words: tuple[str, str, Sequence[str]], body: Iterable[str], draws: bool) -> str:
    """The head of the run's page, and the rest of study.html.

    `fact`: what stands beside the kind; `words`: title, headline, notes; `body`: HTML.
    """
    title, verdict, notes = words
    house = files("billhook.report").joinpath("templates")
    head = house.joinpath("run.html").read_text(encoding="utf-8").partition("</style>")[0]
    made = ["Billhook", kind, fact]
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
    below = f"<p>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(title)}</h2>{body}{below}</section>"


def _json(value: object) -> str:
    return escape(json.dumps(value, allow_nan=False))


def _sets(infos: Iterable[tuple[str, TokenSetInfo]]) -> str:
    """A table of token sets: (use, numbers) each."""
    keys = ("tokens", "documents", "texts", "items")
    lines = []
    for use, info in infos:
        counts = (token_facts(info).get(key) for key in keys)
        lines.append((use, printable(info.source), *("–" if n is None else f"{n:,}" for n in counts)))
    return html_table(("Use", "Source", *(key.capitalize() for key in keys)), lines)


# -- the page of a sweep -----------------------------------------------------------------------------------------------


@page(SweepResult)
def sweep_page(result: SweepResult) -> str:
    """One page of a sweep: losses and accuracies against what is left, all trials, what was refused, how."""
    recipes = list(dict.fromkeys(trial.recipe for trial in result.trials))
    tried = {*recipes, *(each.recipe for each in result.refused)}
    drawn = ""
    if recipes:
        looks = looks_of(recipes)
        charts = [curves_of(result, kind) for kind in ("perplexity", "accuracy")]
        numbers = _json(numbers_of(result, looks))
        drawn = f'<div id="curves" data-numbers="{numbers}">{key_of(result, looks).join(charts)}</div>'
    body = [drawn, _all_trials(result) if recipes else "", _refused(result), _how(result)]
    title = f"{printable(result.model)}: {pluralize(len(tried), 'recipe')}{' compared' if len(tried) > 1 else ''}"
    words = (title, sweep_headline(result), reliability_notes(result))
    return _page("sweep", f"fingerprint {printable(result.fingerprint)}", words, body, bool(drawn))


def _all_trials(result: SweepResult) -> str:
    """The table of all trials, sortable by every column; at first by size, calibration text and loss."""
    texts, tasks, names = texts_of(result), tasks_of(result), short_names(result.teacher)
    heads = [("Recipe", ""), ("Calibrated on", ""), ("Size asked", "")]
    heads += [("Left", words) for words in sizes_of(result).values()]
    heads += [("Attention", "removed"), ("MLP", "removed")]
    for text in texts:
        heads += [("Perplexity", names[text]), ("Above the best, nats", names[text])]
    heads += [("Accuracy", names[task]) for task in tasks] + [("Search", "time"), ("Site evaluations", "")]
    top = "".join(_heading(word, about, about in names.values(), i < 3) for i, (word, about) in enumerate(heads))
    body = "".join(_trial_row(result, trial) for trial in sorted_trials(result))
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


def _trial_row(result: SweepResult, trial: TrialResult) -> str:
    recipe, remove = printable(trial.recipe), printable(trial.remove)
    data = short_names(each.data for each in result.trials)[trial.data]
    shares = (known_fraction(result, trial, size) for size in sizes_of(result))
    cells = [_cell(data, data), _cell(remove, remove)]
    cells += [_cell(2, "–") if share is None else _cell(share, f"{share:.1%}") for share in shares]
    for removed, narrowed in (removed_words(trial, part) for part in PARTS):
        cells.append(_cell(removed, str(removed), narrowed))
    for text in texts_of(result):
        estimate, gap = trial.results[text].estimate, gap_to_best(trial, text)
        ends = format_interval_short(estimate, format_perplexity)
        cells.append(_cell(estimate.value, format_perplexity(estimate.value), ends))
        state = rank_label(gap) if peers(result, trial) > 1 else "alone"
        far = _cell(gap.value, format_nats(gap.value), format_interval(gap, format_nats), state)
        cells.append({"best": _BEST, "alone": _cell(0, "–")}.get(state, far))
    cells += [_accuracy_cell(trial.results[task].estimate) for task in tasks_of(result)]
    cells.append(_cell(trial.search_seconds, format_duration(trial.search_seconds)))
    cells.append(_cell(trial.site_evaluations, format_number(trial.site_evaluations)))
    front = ' class="front"' if "parameters" in trial.front else ""
    return f'<tr{front}><th scope="row" data-sort="{escape(recipe)}">{escape(recipe)}</th>{"".join(cells)}</tr>'


_BEST = '<td data-sort="0"><b class="best">best</b></td>'


def _cell(sort: object, words: str, about: str = "", remark: str = "") -> str:
    """A cell: what it is sorted by, what it says, its interval and a remark."""
    mark = f" <i>{remark}</i>" if remark else ""
    small = f"<small>{escape(about)}</small>" if about else ""
    return f'<td data-sort="{escape(str(sort))}">{escape(words)}{mark}{small}</td>'


def _accuracy_cell(estimate: Estimate) -> str:
    ends = format_interval_short(estimate, format_accuracy)
    return _cell(estimate.value, format_accuracy(estimate.value), ends)


def _refused(result: SweepResult) -> str:
    datas = short_names(each.data for each in result.refused)
    lines = [
        (printable(each.recipe), printable(each.remove), datas[each.data], printable(each.reason))
        for each in result.refused
    ]
    if not lines:
        return ""
    table = html_table(("Recipe", "Size asked", "Calibrated on", "Why"), lines)
    return _section("Refused", f'<div class="why">{table}</div>')


def _how(result: SweepResult) -> str:
    """Teacher, texts and tasks with their sizes, calibration, timing."""
    names = short_names(result.teacher)
    lines = []
    for name, outcome in result.teacher.items():
        spell = format_perplexity if outcome.kind == "perplexity" else format_accuracy
        ends = format_interval(outcome.estimate, spell)
        lines.append((names[name], outcome.kind, spell(outcome.estimate.value), ends))
    teacher = html_table(("Measured on", "Kind", "Teacher", "95% interval"), lines)
    sets = [(f"measured on {names[name]}", info) for name, info in result.evaluation.items()]
    sets += [("calibration", info) for info in result.calibration]
    timing = "Time per token was not measured."
    if result.sizes.ns_per_token:
        timing = (
            f"Time per token: measured site by site, {pluralize(result.batch, 'sequence')} at a time, "
            f"{result.context:,} tokens before the one that is timed."
        )
    caption = (
        "Calibration and held-out documents are never the same. All rows are measured on the same held-out documents, "
        f"so that differences are paired; intervals resample whole texts, or items of a task. {timing}"
    )
    return _section("How it was measured", f"{teacher}<h3></h3>{scrolling(_sets(sets), 'Token sets')}", caption)


# -- the page of a transfer --------------------------------------------------------------------------------------------


@page(TransferResult)
def transfer_page(result: TransferResult) -> str:
    """One page of a transfer: pruned for (rows), measured on (columns), against the teacher and against text."""
    pale = "Pale: the 95% interval includes 0. Framed: measured on the task that it was pruned for."
    teacher = _heat(result.trials, lambda trial, task: trial.results[task].change)
    text = _heat(result.trials[1:], gap_to_text)
    sets = _sets((printable(name), info) for name, info in result.evaluation.items())
    body = [
        _section(
            "Accuracy against the teacher",
            teacher,
            f"Change in percentage points, with its paired 95% interval; orange: worse, blue: better. {pale}",
        ),
        _section(
            "Against pruning on text", text, f"The same, against the first row of the table above. {pale}"
        ) if len(result.trials) > 1 else "",
        _accuracies(result),
        _section(
            "How it was measured", scrolling(sets, "Token sets"),
            "Items that a search looks at are never measured. Differences are paired, item by item.",
        ),
    ]  # fmt: skip
    title = f"{printable(result.model)}: pruned for one task, measured on another"
    words = (title, transfer_headline(result), reliability_notes(result))
    return _page("transfer", f"remove {printable(result.remove)}", words, body, False)


def _heat(trials: Sequence[TrialResult], change: Callable[[TrialResult, str], Estimate]) -> str:
    """A cell a pair, as deep in colour as the change is large."""
    tasks = list(trials[0].results) if trials else []
    most = max((abs(change(trial, task).value) for trial in trials for task in tasks), default=0) or 1
    top = "".join(f'<th scope="col">{escape(printable(task))}</th>' for task in tasks)
    body = ""
    for trial in trials:
        body += f'<tr><th scope="row">{escape(printable(trial.recipe))}</th>'
        for task in tasks:
            gap = change(trial, task)
            kinds = ["worse" if gap.value < 0 else "better"] + ["pale"] * (gap.low <= 0 <= gap.high)
            kinds += ["own"] * (task == trial.recipe)
            depth = f"{10 + 50 * abs(gap.value) / most:.0f}%"
            words = f"{format_points(gap.value)}<small>{format_interval(gap, format_points)}</small>"
            body += f'<td class="{" ".join(kinds)}" style="--depth:{depth}">{words}</td>'
        body += "</tr>"
    head = f"<thead><tr><th>pruned for ↓<br>measured on →</th>{top}</tr></thead>"
    return scrolling(f'<table class="heat">{head}<tbody>{body}</tbody></table>', "pruned for, measured on")


def _accuracies(result: TransferResult) -> str:
    """Plain accuracies, the teacher's first, and what every trial removed."""
    tasks = map(printable, result.teacher)
    heads = ("Pruned for", *tasks, "Attention removed", "MLP removed", "Parameters", "Search time")
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    own = "".join(_accuracy_cell(outcome.estimate) for outcome in result.teacher.values())
    body = f'<tr><th scope="row">the teacher</th>{own}{"<td>–</td>" * 4}</tr>'
    for trial in result.trials:
        body += f'<tr><th scope="row">{escape(printable(trial.recipe))}</th>'
        body += "".join(_accuracy_cell(trial.results[name].estimate) for name in result.teacher)
        ends = [
            *(f"{removed} {narrowed}".strip() for removed, narrowed in (removed_words(trial, part) for part in PARTS)),
            format_number(trial.sizes.parameters),
            format_duration(trial.search_seconds),
        ]
        body += "".join(f"<td>{end}</td>" for end in ends) + "</tr>"
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return _section("Accuracies", scrolling(table, "Accuracies"), "Below each value: its 95% interval.")


# -- the page of a study of stability ----------------------------------------------------------------------------------


@page(StabilityResult)
def stability_page(result: StabilityResult) -> str:
    """One page of a study of stability: agreement against calibration size, and the sites behind it."""
    sizes = sorted(result.sizes, key=lambda size: size.tokens)
    numbers: dict[str, list[float]] = {"tokens": [size.tokens for size in sizes]}
    for key in ("rank_correlation", "overlap"):
        numbers |= {f"{key}_{end}": [getattr(getattr(s, key), end) for s in sizes] for end in ("mean", "low", "high")}
    label = "rank correlation and plan overlap against calibration tokens; the table below has the numbers"
    drawn = f'data-kind="stability" data-numbers="{_json(numbers)}"'
    box = f'<div class="chart" role="img" aria-label="{label}" {drawn}></div>'
    lines, sites = [], []
    for size in sizes:
        ranks, overlap, votes = size.rank_correlation, size.overlap, removal_counts(size)
        always = [site for site, n in votes.items() if n == size.sets]
        some = {site: n for site, n in votes.items() if n < size.sets}
        pairs = size.sets * (size.sets - 1) // 2
        cells = (
            f"{format_correlation(ranks.mean)} ({format_interval(ranks, format_correlation)})",
            f"{format_share(overlap.mean)} ({format_interval(overlap, format_share)})",
        )
        lines.append((f"{size.tokens:,}", str(size.sets), str(pairs), *cells, str(len(always)), str(len(some))))
        sites.append((f"{size.tokens:,}", _parts(dict.fromkeys(always, 0)), _parts(some)))
    heads = ("Tokens", "Sets", "Pairs", "Rank correlation", "Overlap of plans", "Sites in all plans", "In some")
    body = [
        f'<section class="curves"><h2>Agreement of calibration sets</h2>{box}<p>Dots: mean over all pairs of sets; '
        "bars: lowest and highest pair. Rank correlation (Spearman) is of the scores of all sites; overlap is what two "
        "plans share of all that either removes.</p></section>",
        _section(
            "In numbers", scrolling(html_table(heads, lines), "In numbers"), "In brackets: lowest to highest pair."
        ),
        _section(
            "Which sites are removed",
            f"{_votes(sizes)}<details><summary>The same as a table</summary>"
            f"{html_table(('Tokens', 'In all plans', 'In some plans (in how many)'), sites)}</details>",
        ),
        _section("How it was measured", html_table(("", ""), _stability_conditions(result))),
    ]
    words = (
        f"{printable(result.model)}: how far {printable(result.metric)} can be trusted",
        stability_headline(result),
        (),
    )
    return _page("stability", f"remove {printable(result.remove)}", words, body, True)


def _parts(votes: Mapping[str, int]) -> str:
    """`attention 2, 4 (3); mlp 16`: sites and, where it is not 0, their number of plans."""
    blocks: dict[str, list[str]] = {}
    for site, n in votes.items():
        part, block = site.split(".")
        blocks.setdefault(part, []).append(f"{block} ({n})" if n else block)
    return "; ".join(f"{part} {', '.join(numbers)}" for part, numbers in sorted(blocks.items())) or "none"


def _stability_conditions(result: StabilityResult) -> list[tuple[str, str]]:
    data = result.data
    facts = f"{printable(data.source)}: {data.tokens:,} tokens, {count_items(data)}"
    asked = {"Metric": result.metric, "Search": result.search, "Size asked": result.remove}
    return [
        *((key, printable(value)) for key, value in asked.items()),
        ("Calibration", f"{facts}; no two sets share {'a document' if data.items is None else 'an item'}"),
    ]


def _votes(sizes: Sequence[StabilitySize]) -> str:
    """Blocks from left to right, ten to a table; a row a part and calibration size, as deep as plans agree."""
    votes = [removal_counts(size) for size in sizes]
    last = max((site.block for size in sizes for plan in size.plans for site in plan.removed), default=0)
    tables = []
    for start in range(0, last + 1, 10):
        blocks = range(start, min(start + 10, last + 1))
        lines = f"<tr><th>block</th>{''.join(f'<th scope=col>{block}</th>' for block in blocks)}</tr>"
        for part in PARTS:
            lines += f'<tr class="part"><th colspan="{len(blocks) + 1}">{part}</th></tr>'
            for size, each in zip(sizes, votes, strict=True):
                lines += f"<tr><th scope=row>{size.tokens:,}</th>"
                for name in (str(Site(block, part)) for block in blocks):
                    n = each.get(name, 0)
                    about = f"{name}: in {n} of {size.sets} plans with {size.tokens:,} tokens"
                    kind = "none" if not n else "all" if n == size.sets else "some"
                    depth = f"{100 * n / size.sets:.0f}%"
                    lines += f'<td><i class="{kind}" style="--depth:{depth}" title="{about}">{n or ""}</i></td>'
                lines += "</tr>"
        tables.append(f'<table style="--n:{len(blocks)}">{lines}</table>')
    caption = f"In how many plans each site is removed, a row for each number of tokens. After block {last}: none."
    return f'<div class="map long votes">{"".join(tables)}</div><p>{caption}</p>'
