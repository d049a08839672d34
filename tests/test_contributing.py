"""The examples of CONTRIBUTING.md are applied to a copy of the package and used; each touches at most four files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from billhook.models.load import load

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST_FILES = 4


def blocks(example: str) -> list[tuple[str, str]]:
    """(python or diff, text) of the fenced blocks under the heading of an example."""
    section = re.search(rf"^### {example}\n(.*?)(?=^##)", PAGE, re.S | re.M)
    assert section is not None, f"CONTRIBUTING.md has no example {example!r}"
    return re.findall(r"^```(python|diff)\n(.*?)^```$", section[1], re.S | re.M)


def apply_block(home: Path, kind: str, text: str) -> None:
    """Write a new file, or add lines to one: the lines around them must be there, once, one after another."""
    first, body = text.split("\n", 1)
    path = home / first.removeprefix("# ").removeprefix("--- ")
    if kind == "python":
        assert not path.exists(), f"{first}: the file is there already"
        path.write_text(body, encoding="utf-8")
        return
    lines = body.removesuffix("\n").split("\n")
    assert all(line[:1] in ("+", " ") for line in lines), "only additions are understood"
    around = "\n".join(line[1:] for line in lines if line[0] == " ")
    before = path.read_text(encoding="utf-8")
    assert before.count(around) == 1, f"{first}: {before.count(around)} places look like\n{around}"
    path.write_text(before.replace(around, "\n".join(line[1:] for line in lines)), encoding="utf-8")


def run(home: Path, *command: object) -> str:
    """What a command prints, with the copy of the package first on the path."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | {"PYTHONPATH": str(home)}, cwd=home,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.suffix in (".py", ".md")}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its docs, to be changed."""
    home = tmp_path / "copy"
    for name in ("billhook", "docs"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.svg"))
    return home


def applied(home: Path, example: str) -> set[str]:
    """Apply an example and write the docs; which files differ then."""
    before = contents(home)
    found = blocks(example)
    assert found
    for kind, text in found:
        apply_block(home, kind, text)
    run(home, home / "docs" / "generate.py")
    after = contents(home)
    return {name for name in after if after[name] != before.get(name)}


def test_an_export_is_added_as_the_page_says(copy: Path, model: Path, text: Path, tmp_path: Path) -> None:
    touched = applied(copy, "An export")
    assert touched == {
        "billhook/methods/export/whole_blocks.py", "billhook/methods/export/__init__.py", "docs/methods.md"
    }  # fmt: skip
    assert len(touched) <= MOST_FILES
    out = tmp_path / "out"
    told = json.loads(run(
        copy, "-m", "billhook", "prune", model, "--plan", "attention.1,mlp.1", "--export", "whole_blocks", "--out", out,
        "--data", text, "--tokens", 96, "--length", 16, "--eval-tokens", 256, "--proof", "loss",
        "--store", tmp_path / "runs.db", "--json",
    ))  # fmt: skip
    assert told["recipe"]["export"] == "whole_blocks"
    assert json.loads((out / "blocks.json").read_text()) == [0, 2, 3]
    assert load(out).positions == (0, 2, 3)


def test_a_command_is_added_as_the_page_says(copy: Path) -> None:
    touched = applied(copy, "A command")
    assert touched == {"billhook/cli/main.py", "billhook/cli/tables.py", "docs/commands.md"}
    assert len(touched) <= MOST_FILES
    assert "llama\nmistral\n" in run(copy, "-m", "billhook", "types")
    assert json.loads(run(copy, "-m", "billhook", "types", "--json"))["types"][0] == "cohere"
    assert "billhook types" in (copy / "docs" / "commands.md").read_text()


def test_a_page_is_added_as_the_page_says(copy: Path, model: Path, tmp_path: Path) -> None:
    assert applied(copy, "A page") == {"billhook/report/eval_page.py"}
    task, store = tmp_path / "task.jsonl", tmp_path / "runs.db"
    items = ({"query": f"Is {n} odd?", "choices": ["yes", "no"], "gold": (n + 1) % 2} for n in range(8))
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    run(copy, "-m", "billhook", "eval", model, "--tasks", task, "--store", store)
    (kept,) = json.loads(run(copy, "-m", "billhook", "runs", "--store", store, "--json"))["runs"]
    assert "Page: reports/" in run(copy, "-m", "billhook", "report", kept["run"], "--store", store)
    page = (copy / "reports" / kept["run"] / "index.html").read_text()
    assert "Billhook · eval" in page
    assert "acc_norm" in page


def test_a_study_is_added_as_the_page_says(copy: Path, model: Path, text: Path, tmp_path: Path) -> None:
    touched = applied(copy, "A study")
    assert touched == {
        "billhook/core/results/overlap.py", "billhook/studies/overlap.py", "billhook/cli/studies.py", "docs/commands.md"
    }  # fmt: skip
    assert len(touched) <= MOST_FILES
    store = tmp_path / "runs.db"
    asked = ("overlap", model, "--recipes", "shortgpt,finercut", "--remove", "25%sites", "--data", text, "--tokens", 96,
             "--length", 16, "--self-share", 0, "--store", store)  # fmt: skip
    (row,) = table = rows_of(run(copy, "-m", "billhook", *asked))
    assert row["a"] == "shortgpt"
    told = json.loads(run(copy, "-m", "billhook", *asked, "--json"))["plans"]
    plans = {name: plan["removed"] for name, plan in told.items()}
    assert {name: len(plan) for name, plan in plans.items()} == {"shortgpt": 2, "finercut": 2}
    assert int(row["both"]) == len(set(plans["shortgpt"]) & set(plans["finercut"]))
    kept = json.loads(run(copy, "-m", "billhook", "runs", "--store", store, "--json"))["runs"]
    assert [each["kind"] for each in kept] == ["overlap", "overlap"]
    assert rows_of(run(copy, "-m", "billhook", "show", kept[0]["run"], "--store", store)) == table


def rows_of(printed: str) -> list[dict[str, str]]:
    """The lines below the line that begins with "a", by its columns."""
    lines = [line.split() for line in printed.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:2] == ["a", "b"])
    return [dict(zip(lines[head], line, strict=True)) for line in lines[head + 1 :]]


def test_a_block_that_does_not_fit_is_told(copy: Path) -> None:
    with pytest.raises(AssertionError, match="0 places look like"):
        apply_block(copy, "diff", "--- billhook/cli/main.py\n no such line\n+and more\n")
    with pytest.raises(AssertionError, match="is there already"):
        apply_block(copy, "python", "# billhook/cli/main.py\npass\n")
