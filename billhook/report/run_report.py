"""The model card of a run, and its page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from billhook.core.errors import visible
from billhook.core.plan import PARTS, Site
from billhook.core.results.measured import Step, TokenSetInfo
from billhook.core.results.run import Answer, RunResult
from billhook.report.frame import chart, escaped, html_table, markdown, readable_value, whole_spans, yaml_lines
from billhook.report.numbers import count_items, format_duration, format_number, pluralize, token_facts
from billhook.report.pages import page
from billhook.report.run_words import (
    RECOVERY_COLUMNS,
    checkpoint_type,
    headline,
    kept_group_counts,
    kept_group_texts,
    recovery_rows,
    run_notes,
    search_in_words,
    summary_rows,
)


def write_report(result: RunResult, folder: Path) -> None:
    """Write report.json, the page and the model card of a result into a folder."""
    (folder / "report.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(run_page(result), encoding="utf-8", errors="backslashreplace")
    (folder / "README.md").write_text(model_card(result), encoding="utf-8")


NARROWER = '<span><i class="narrower" style="--left:60%"></i>narrower: the lower part stays</span>'


def _sites_in_words(sites: Sequence[Site]) -> list[str]:
    """`attention of blocks 3, 5` and `mlp of block 2`."""
    words = []
    for part in PARTS:
        blocks = [str(site.block) for site in sites if site.part == part]
        if blocks:
            words.append(f"{part} of block{'s' if len(blocks) > 1 else ''} {', '.join(blocks)}")
    return words


def _removed_earlier(result: RunResult) -> list[Site]:
    """Sites of the unpruned model that were removed before this run."""
    present = set(result.anatomy.sites_present())
    all_sites = (Site(block, part) for block in range(result.anatomy.blocks) for part in PARTS)
    return [site for site in all_sites if site not in present]


# -- the model card ----------------------------------------------------------------------------------------------------


def model_card(result: RunResult) -> str:
    """README.md of the checkpoint: Markdown with the YAML front matter of the Hugging Face hub."""
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- billhook\n- pruned\n---"
    removed = _sites_in_words(result.plan.sites()) or ["nothing"]
    if earlier := _removed_earlier(result):
        removed.append(f"removed before this run: {'; '.join(_sites_in_words(earlier))}")
    removed += [f"{site}: {left} channel groups stay" for site, left in kept_group_texts(result).items()]
    lines = [f"| {r.label} | {r.teacher} | {r.student} | {r.change} |" for r in summary_rows(result)]
    table = "\n".join(["| | teacher | student | change |", "|---|---|---|---|", *lines])
    data = [
        f"- {use}: {markdown(info.source)}, {info.tokens:,} tokens in {count_items(info)}"
        for use, info in _data(result)
    ]
    where = ", ".join(f"{key} {value}" for key, value in asdict(result.environment).items())
    card = "\n\n".join(
        [
            front,
            f"# {markdown(result.model.name)}, pruned",
            headline(result),
            "\n".join(f"> {markdown(note)}\n>" for note in run_notes(result)).removesuffix("\n>"),
            "## What was removed",
            "\n".join(f"- {words}" for words in removed) + "\n\nBlocks are counted from 0 in the unpruned model.",
            "## Measured",
            table + "\n\nIn brackets: 95% intervals. The teacher is the model before this pruning.",
            _recovered_card(result),
            f"## How to load it\n\n{_loading(result)}",
            f"## Recipe\n\n```yaml\n{yaml_lines(result.recipe)}\n```",
            "## Data\n\n" + "\n".join(data),
            f"## Environment\n\n{markdown(where)}",
            f"Made with Billhook {markdown(result.billhook)}, run {markdown(result.run)}, "
            f"{markdown(result.created)}.\n",
        ]
    ).replace("\n\n\n\n", "\n\n")
    return visible(_without_paths(card, result))


_PATH = re.compile(r"(?:(?:~[\w.-]*|\.{1,2})?[/\\]|[A-Za-z]:[/\\])[^/\\\n].*")  # of one machine
_BEFORE_PATHS = re.compile(r"[+,]|^(?:[\w.]+:)")  # between the sources of a text, and before the file of a task


def _without_paths(card: str, result: RunResult) -> str:
    """A card in which files and folders of this machine have their last name alone: it is published."""
    told = [text for name, value in result.to_json().items() if name != "answers" for text in _texts(value)]
    pieces = {piece for text in told for piece in _BEFORE_PATHS.split(text)}
    for path in sorted(filter(_PATH.fullmatch, pieces), key=len, reverse=True):
        name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        for shown, short in ((path, name), (markdown(path), markdown(name)), (json.dumps(path)[1:-1], name)):
            card = card.replace(shown, short)
    return card


def _texts(value: Any) -> list[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inside for text in _texts(each)]


def _data(result: RunResult) -> list[tuple[str, TokenSetInfo]]:
    """The tokens of a run with their use."""
    return [("calibration", result.data.calibration), ("evaluation", result.data.evaluation)]


def _recovered_card(result: RunResult) -> str:
    lines = [f"| {' | '.join(row)} |" for row in recovery_rows(result)]
    head = [f"| {' | '.join(RECOVERY_COLUMNS)} |", "|---|---|---|---|---|"]
    return "\n".join(["## What recovery gave back", "", *head, *lines]) if lines else ""


def _loading(result: RunResult) -> str:
    ours, trust = result.checkpoint.startswith("billhook-"), ""
    words = "A stock checkpoint: plain transformers loads it, and so does whatever reads this architecture."
    if "zeroed" in result.reasons:
        words = (
            "A stock checkpoint whose removed sites hold zeros: whatever reads this architecture loads it, "
            "**no speed-up** and no memory saved."
        )
    if ours:
        trust = ", trust_remote_code=True"
        words = (
            "Single sites were removed, or made narrower, which no stock class can express: the checkpoint brings its "
            "own small class. Trust it as below, or install Billhook and call `import billhook; billhook.register()` "
            "first. Without either it fails to load."
        )
    return (
        f"{words}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file is\n'
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n```"
    )


# -- the page ----------------------------------------------------------------------------------------------------------


@page(RunResult)
def run_page(result: RunResult) -> str:
    """One self-contained HTML page. The frame, its style and its small script are in report.html."""
    charts = _loss_chart(result), _speed_chart(result)
    when = re.sub(r"T(\d\d:\d\d).*\+00:00$", r" \1 UTC", result.created)
    kind = checkpoint_type(result)
    made = f"Billhook {result.billhook} · run {result.run} · {when} · {kind}"
    measured = html_table(
        ("Measure", "Teacher", "Student", "Change"),
        [(r.label, r.teacher, r.student, r.change) for r in summary_rows(result)],
    )
    facts = asdict(result.environment) | {f"model {key}": value for key, value in asdict(result.model).items()}
    facts |= {"kind": kind, "out": result.out, "created": result.created}
    data = {use: token_facts(info) for use, info in _data(result)}
    keys = list(dict.fromkeys(key for about in data.values() for key in about))
    seconds = {**result.seconds, "total": math.fsum(result.seconds.values())}
    frame = Template(files("billhook.report").joinpath("templates").joinpath("run.html").read_text(encoding="utf-8"))
    return frame.substitute(
        title=escaped(f"{result.model.name}, pruned"),
        made=escaped(made),
        verdict=escaped(headline(result)),
        notes="".join(f'<p class="note">{escaped(note)}</p>' for note in run_notes(result)),
        table=whole_spans(measured),
        map=_map(result),
        narrower=NARROWER if kept_group_counts(result) else "",
        removals=_removals(result),
        recovered=_recovered(result),
        charts="".join(charts),
        answers=_answers(result.answers),
        recipe=escaped(yaml_lines(result.recipe)),
        data=html_table(
            ("", *data), [(key, *(readable_value(about.get(key)) for about in data.values())) for key in keys]
        ),
        environment=html_table(
            ("Name", "Value"), [(key.replace("_", " "), readable_value(value)) for key, value in facts.items()]
        ),
        seconds=html_table(("Stage", "Time"), [(stage, format_duration(spent)) for stage, spent in seconds.items()]),
        plotly=get_plotlyjs() if any(charts) else "",
    )


def _cells(result: RunResult) -> dict[Site, tuple[str, str, str]]:
    """Every site of the unpruned model: state (kept, narrowed, removed, removed earlier), mark and description."""
    steps, narrow = result.steps, kept_group_texts(result)
    turn = {site: (number, step) for number, step in enumerate(steps, 1) for site in step.sites}
    cells = {site: ("earlier", "", f"{site}: removed before this run") for site in _removed_earlier(result)}
    for size in result.anatomy.sites:
        site = size.site
        about = f"{site}: {size.parameters:,} parameters, "
        if str(site) in narrow:
            cells[site] = ("narrower", "", about + f"{narrow[str(site)]} channel groups kept")
        elif site not in result.plan.removed:
            cells[site] = ("kept", "", about + "kept")
        elif site in turn:
            number, step = turn[site]
            order = f"removal {number} of {len(steps)}, loss {step.loss:.4g} after it"
            cells[site] = ("removed", str(number), about + order)
        else:
            cells[site] = ("removed", "×", about + "removed by the given plan")
    return cells


def _map(result: RunResult) -> str:
    """Blocks from left to right, ten to a table, so that narrow screens can stack the tables; attention above mlp."""
    cells, blocks, tables = _cells(result), result.anatomy.blocks, []
    shares = {site: kept / had for site, (kept, had) in kept_group_counts(result).items()}
    for start in range(0, blocks, 10):
        span = range(start, min(start + 10, blocks))
        lines = f"<tr><th>block</th>{''.join(f'<th scope=col>{block}</th>' for block in span)}</tr>"
        for part in PARTS:
            lines += f"<tr><th scope=row>{part}</th>"
            for site in (Site(block, part) for block in span):
                state, mark, about = cells[site]
                stop = 0 if site == Site(0, "attention") else -1
                button = f'class="{state}" data-site="{site}" tabindex="{stop}" aria-label="{escaped(about)}"'
                button += f' style="--left:{shares[str(site)]:.0%}"' if str(site) in shares else ""
                lines += f'<td><button type="button" {button}>{mark}</button></td>'
            lines += "</tr>"
        tables.append(f'<table style="--n:{len(span)}">{lines}</table>')
    return f'<div class="map{" long" if blocks > 30 else ""}">{"".join(tables)}</div>'


def _removed_in_step(step: Step) -> str:
    """What one step removed, in words."""
    narrowed = [f"{pluralize(len(step.narrowed), 'site')} narrower"] if step.narrowed else []
    return ", ".join([*map(str, step.sites), *narrowed])


def _removals(result: RunResult) -> str:
    """The removals as a table: what the map and the chart show, for reading and for screen readers."""
    if not result.steps:
        return "<p>A given plan was applied without a search, so its removals have no order and no losses.</p>"
    sizes = {size.site: size.parameters for size in result.anatomy.sites}
    lines = [
        (
            str(number),
            _removed_in_step(step),
            "" if step.narrowed else format_number(sum(sizes.get(site, 0) for site in step.sites)),
            f"{step.loss:.4g}",
            format_number(step.gap) + ("" if step.gap_se is None else f" ± {format_number(1.96 * step.gap_se)}"),
        )
        for number, step in enumerate(result.steps, 1)
    ]
    table = html_table(("No.", "Site", "Parameters", "Loss", "Gap ± 95%"), lines)
    words = f"<p>{escaped(search_in_words(result.search))}</p>"
    if narrow := kept_group_texts(result):
        listed = ", ".join(f"{site} ({kept})" for site, kept in narrow.items())
        words += f"<p>{escaped(f'Narrower, with how many of their channel groups: {listed}.')}</p>"
    return f"{words}<details><summary>The removals in order, as a table</summary>{table}</details>"


def _recovered(result: RunResult) -> str:
    """The recoveries of a run, on every text; nothing where there are none."""
    lines = recovery_rows(result)
    caption = "Before and after each, in pairs; in brackets 95% intervals. The gap is that to the teacher."
    table = whole_spans(html_table(RECOVERY_COLUMNS, lines))
    return (
        f"<section class=recovered><h2>What recovery gave back</h2>{table}<p>{caption}</p></section>" if lines else ""
    )


def _loss_chart(result: RunResult) -> str:
    """The loss after every removal, and the gap to the second best with its 95% interval."""
    steps = result.steps
    if not steps:
        return ""
    errors = [None if step.gap_se is None else 1.96 * step.gap_se for step in steps]
    known = [(step.gap, error) for step, error in zip(steps, errors, strict=True) if step.gap is not None]
    clear = sum(error is not None and gap > error for gap, error in known)
    label = f"Loss after each of {len(steps)} removals: from {steps[0].loss:.4g} to {steps[-1].loss:.4g}."
    caption = (
        f"Above: the loss ({result.loss}, {result.loss_unit} per token, lower is better) after each removal. Below: "
        "how much worse the second-best choice was, with its 95% interval over documents (1.96 standard errors). Where "
        f"it reaches zero (hollow), the choice may be noise. Clear of zero: {clear} of "
        f"{pluralize(len(known), 'choice')}."
    )
    numbers: dict[str, list[Any]] = {"sites": [_removed_in_step(step) for step in steps], "error": errors}
    numbers |= {"loss": [step.loss for step in steps], "gap": [step.gap for step in steps]}
    return chart("loss", "Loss along the removals", label, caption, numbers)


def _speed_chart(result: RunResult) -> str:
    """Speed of the student over that of the teacher: measured with its interval, and predicted."""
    speed = result.speed
    if not speed:
        return ""
    rows = [row for row in summary_rows(result) if row.label.endswith("tokens/s")]
    label = "Student's speed over teacher's. " + "; ".join(f"{row.label}: {row.change}" for row in rows) + "."
    caption = "Dots: measured, with 95% intervals. Diamonds: predicted. "
    caption += (
        "Protocol: "
        + ", ".join(f"{key.replace('_', ' ')} {readable_value(value)}" for key, value in asdict(speed.protocol).items())
        + "."
    )
    phases = (speed.ratio.prefill, speed.ratio.decode)
    numbers = {"median": [p.value for p in phases], "low": [p.low for p in phases], "high": [p.high for p in phases]}
    return chart("speed", "Speed-up", label, caption,
                 {**numbers, "predicted": [speed.predicted.prefill, speed.predicted.decode]})  # fmt: skip


def _answers(answers: Sequence[Answer]) -> str:
    articles = []
    for answer in answers:
        same = "<small>the same words</small>" if answer.teacher == answer.student else ""
        sides = "".join(
            f"<div><h4>{who}</h4><p>{escaped(text) or '<small>(nothing: it ended at once)</small>'}</p></div>"
            for who, text in (("Teacher", answer.teacher), ("Student", answer.student))
        )
        articles.append(f'<article><h3>{escaped(answer.prompt)} {same}</h3><div class="pair">{sides}</div></article>')
    return "".join(articles) or "<p>No prompts were answered.</p>"
