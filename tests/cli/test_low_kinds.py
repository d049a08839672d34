"""Values that are empty, alone or odd are refused with what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from billhook.cli.main import app


def told(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "name", ["remove", "plan", "within", "search", "metric", "loss", "set", "data", "eval-data", "field", "memory",
             "device", "dtype", "export", "recover-data"],
)  # fmt: skip
def test_an_empty_value_is_refused(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, words = told(
        "prune", model, *(() if name in ("remove", "plan", "within") else ("--remove", "10%")), f"--{name}", ""
    )
    assert code == 2
    assert f"--{name} is empty. Give a value, or leave it out." in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["prune", "inspect", "score", "eval", "speed", "sweep", "gate"])
def test_an_empty_model_is_not_the_demo(command: str) -> None:
    code, words = told(command, "", *(("--baseline", "b") if command == "gate" else ()))
    assert code == 2
    assert "The model's name is empty" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--store", ":memory:"), "is no file"),
        (("--store", "s" * 300), "cannot be written"),
        (("--out", "-"), "names no folder"),
        (("--out", ""), "the folder that you are in"),
        (("--recipe", ""), "There is no recipe"),
        (
            ("--search", "oneshot", "--metric", "flap"),
            "Searches for it: --search joint, --search rank_channels, --search two_stage.",
        ),
        (("--search", "joint", "--metric", "cosine"), "scores sites or blocks, and the search joint takes scores of"),
        (("--recipe", "r" * 5000), "There is no recipe"),
        (("--search", "swap", "--recover-set", "rank=3"), "--recover-set has no effect without a recovery"),
    ],
)
def test_what_cannot_be_used_is_told(
    arguments: tuple[str, ...], words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = told("prune", model, "--remove", "10%", "-q", *arguments)
    assert code == 2
    assert words in said
    assert "Traceback" not in said


def test_reading_commands_take_no_odd_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for store in (":memory:", "s" * 300, "a/b", ""):
        code, said = told("runs", "--store", store)
        assert code == 2
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
