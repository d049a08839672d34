"""The model card of a student: README.md of its checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from billhook.core.errors import visible
from billhook.core.results.measured import TokenSetInfo
from billhook.core.results.run import RunResult
from billhook.report.frame import markdown, yaml_lines
from billhook.report.numbers import count_items
from billhook.report.run.narrowed import narrowed_sites
from billhook.report.run.sites import removed_earlier, sites_in_words
from billhook.report.run.skills import lost_skills
from billhook.report.run.smaller_vocabulary import rows_in_words
from billhook.report.run_words import (
    RECOVERY_COLUMNS,
    headline,
    recovery_rows,
    run_notes,
    summary_rows,
)

DRAWING = "architecture.svg"  # beside the card


def model_card(result: RunResult) -> str:
    """README.md of the checkpoint: Markdown with the YAML front matter of the Hugging Face hub."""
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- billhook\n- pruned\n---"
    removed = [rows_in_words(result.vocabulary)] if result.vocabulary is not None else []
    removed += sites_in_words(result.plan.sites())
    if earlier := removed_earlier(result):
        removed.append(f"removed before this run: {'; '.join(sites_in_words(earlier))}")
    removed += [f"narrowed: {kind}" for kind in narrowed_sites(result)]
    lines = [f"| {r.label} | {r.teacher} | {r.student} | {r.change} |" for r in summary_rows(result)]
    table = "\n".join(["| | teacher | student | change |", "|---|---|---|---|", *lines])
    data = [
        f"- {use}: {markdown(info.source)}, {info.tokens:,} tokens in {count_items(info)}"
        for use, info in data_of(result)
    ]
    where = ", ".join(f"{key} {value}" for key, value in asdict(result.environment).items())
    card = "\n\n".join(
        [
            front,
            f"# {markdown(result.model.name)}, pruned",
            " ".join(filter(None, (lost_skills(result), headline(result)))),
            "\n".join(f"> {markdown(note)}\n>" for note in run_notes(result)).removesuffix("\n>"),
            "## What was removed",
            f"![The model before and after]({DRAWING})",
            "\n".join(f"- {words}" for words in removed or ["nothing"])
            + "\n\nBlocks are counted from 0 in the unpruned model.",
            "## Measured",
            table + "\n\nIn brackets: 95% intervals. The teacher is the model before this pruning.",
            _recovered_card(result),
            f"## How to load it\n\n{_loading(result)}",
            f"## Recipe\n\n{_recipe(result)}",
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


def data_of(result: RunResult) -> list[tuple[str, TokenSetInfo]]:
    """The tokens of a run with their use."""
    return [("calibration", result.data.calibration), ("evaluation", result.data.evaluation)]


def _recipe(result: RunResult) -> str:
    """What of the recipe is not at its default, where that is known."""
    told = {name: value for name, value in result.recipe.items() if name in result.changed and name != "about"}
    more = "\n\nEverything else is at its default; report.json of the run has all." if told else ""
    return f"```yaml\n{yaml_lines(told or result.recipe)}\n```{more}"


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
            "Single sites were removed, or narrowed, which no stock class can express: the checkpoint brings its "
            "own small class. Trust it as below, or install Billhook and call `import billhook; billhook.register()` "
            "first. Without either it fails to load."
        )
    return (
        f"{words}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file is\n'
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n```"
    )
