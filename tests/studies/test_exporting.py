"""Exports asked for by name: their card, and what is said of every wrong input before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook.core.errors import BillhookError
from billhook.core.files.hub import published_files, require_no_paths
from billhook.models.load import Teacher, load
from billhook.report.run.export_card import run_commands
from billhook.runtimes import Runtime

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for the store, which lies where a command is typed."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def student(checkpoint: Folder, tmp_path: Path) -> Path:
    """A pruned checkpoint without a tokenizer, and no card of its own."""
    teacher = load(checkpoint("llama"))
    plan = billhook.Plan.parse(["mlp.1", "attention.2"])
    folder = tmp_path / "student"
    billhook.save(billhook.apply(teacher, plan), None, plan, folder, teacher=teacher)
    return folder


@pytest.mark.parametrize(("to", "verify"), [("gguf", None), ("gguf", False), ("deci", False), ("transformers", None)])
def test_a_folder_says_what_it_is_and_whether_it_was_verified(
    to: str, verify: bool | None, student: Path, tmp_path: Path
) -> None:
    report = billhook.export(student, to, out=tmp_path / "out", verify=verify)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "README.md" in report.files
    verified = "Verified in llama.cpp " if report.verified else "Not verified: "
    assert verified in card
    assert (report.verified is not None) == (to == "gguf" and verify is None)
    assert all(command in card for command in run_commands(to, report.files))
    assert str(tmp_path) not in card
    (filed,) = billhook.list_runs()
    assert (filed.kind, filed.state, filed.out) == ("export", "done", str(tmp_path / "out"))
    assert billhook.show(filed.run).result == report
    require_no_paths(tmp_path / "out", published_files(tmp_path / "out"))


def never(*given: object, **more: object) -> Iterator[Any]:
    raise AssertionError("the model was loaded")


def test_what_is_wrong_is_said_before_a_model_is_read(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((student / "config.json").read_text())
    monkeypatch.setattr("billhook.models.load.Teacher.__init__", never)
    for model, to, more, told in (
        (student, "ggfu", {}, "There is no export called 'ggfu'. Did you mean 'gguf'?"),
        (student, "gguf", {"out": taken}, "is not empty. Choose a folder that is not there yet"),
        (student, "deci", {"dtype": "f16"}, "There is no option 'dtype' of deci. It has none: leave it out."),
        (half, "gguf", {}, "half"),
    ):
        with pytest.raises(BillhookError) as refused:
            billhook.export(model, to, **{"out": tmp_path / "out", **more})
        assert told in str(refused.value)
        assert [path.name for path in taken.iterdir()] == ["notes.txt"]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", "taken-"))]


def test_a_runtime_that_is_asked_for_and_missing_is_named(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "installed", property(lambda self: False))
    with pytest.raises(BillhookError, match=r"pip install 'billhook\[llama\]'"):
        billhook.export(student, "gguf", out=tmp_path / "out", verify=True)
    assert billhook.export(student, "gguf", out=tmp_path / "out").verified is None
    with pytest.raises(BillhookError, match="No runtime verifies the export stock"):
        billhook.export(student, "stock", out=tmp_path / "more", verify=True)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    teacher: Teacher = load(tiny.with_tokenizer(tmp_path / "model"))
    with pytest.raises(BillhookError, match="convert_hf_to_gguf"):
        billhook.export(teacher, "gguf", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert [filed.state for filed in billhook.list_runs()] == ["failed"]


def test_a_plan_that_a_target_has_no_place_for_says_what_it_has(checkpoint: Folder, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=r"llama\.cpp has no place for a block without its attention; remove whole"):
        billhook.prune(
            checkpoint("qwen3"), plan="attention.1", target="llama.cpp", out=tmp_path / "out", store=tmp_path / "s.db",
            data="pydoc", tokens=64, length=32, eval_tokens=64, eval_length=32,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_killed_export_left_is_no_model(student: Path, tmp_path: Path) -> None:
    """It has a name of its own, which a second try does not meet."""
    aside = tmp_path / "out-r123456.partial"
    aside.mkdir()
    (aside / "model-F16.gguf").write_bytes(b"GGUF")
    billhook.export(student, "gguf", out=tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "model-F16.gguf").stat().st_size > 1000
