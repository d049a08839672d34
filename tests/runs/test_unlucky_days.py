"""Full disks, taken folders and moved ones: a run ends with exit 5, keeps what it found, and resumes from it."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import SafetensorError

import billhook
from billhook.core.errors import FingerprintError, ResourceError, RunError, UsageError, cannot_write, writing
from billhook.core.events import Event
from billhook.core.files.target_folder import check_target, named_folder
from billhook.core.plan import Plan
from billhook.engine.probe import logits
from billhook.methods.export.checkpoint import save
from billhook.models.surgery import apply
from billhook.runs.store import Store

SHORT: dict[str, Any] = {"remove": "2sites", "search": "greedy", "tokens": 160, "length": 20, "eval_tokens": 256,
                         "eval_length": 32, "self_share": 0.0, "recover": "fold", "recover_tokens": 640,
                         "recover_length": 32}  # fmt: skip


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def full(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def at_stage(monkeypatch: pytest.MonkeyPatch, stage: str, act: Callable[[], None]) -> None:
    """Act once, when a stage of a run begins."""
    add, done = Store.add_event, list[str]()

    def add_event(self: Store, run: str, event: Event, *, at_once: bool = False) -> None:
        add(self, run, event, at_once=at_once)
        if event.stage == stage and not done:
            done.append(stage)
            act()

    monkeypatch.setattr(Store, "add_event", add_event)


def sqlite_full(_: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


@pytest.mark.parametrize(
    "make",
    [
        *(lambda _, number=number: full(number) for number in UNWRITABLE),
        sqlite_full,
        lambda _: SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        lambda _: RuntimeError("[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file x"),
    ],
)  # fmt: skip
def test_every_disk_that_takes_no_more_is_told_alike(make: Callable[[int], Exception]) -> None:
    assert cannot_write(make(0))
    with pytest.raises(ResourceError, match=r"What was measured is kept.*run it again") as told, writing():
        raise make(0)
    assert told.value.exit_code == 5
    with pytest.raises(KeyError), writing():
        raise KeyError
    assert not cannot_write(full(errno.EACCES))


@pytest.mark.parametrize("stage", ["search", "recover", "evaluate", "save", "report"])
def test_a_disk_that_fills_up_loses_nothing(
    stage: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured and recovered before is not done again."""
    events: list[object] = []

    def fill() -> None:
        raise full(errno.ENOSPC)

    at_stage(monkeypatch, stage, fill)
    with pytest.raises(ResourceError, match=r"billhook\.resume"):
        billhook.prune(str(model), data=str(text), out=tmp_path / "out", store=tmp_path / "b.db", **SHORT)
    left = [path.suffix for path in tmp_path.glob(".out*")]
    assert left == ([".recovery"] if stage not in ("search", "recover") else [])
    with closing(Store(tmp_path / "b.db", read_only=True)) as store:
        before = store.count_losses()
    result = billhook.resume(store=tmp_path / "b.db", watch=lambda event: events.append(event.values.get("step", "")))
    with closing(Store(tmp_path / "b.db", read_only=True)) as store:
        assert store.count_losses() >= before
        assert stage == "search" or store.count_losses() == before
    assert ("fold" in events) == (stage in ("search", "recover"))
    assert [path.name for path in tmp_path.glob(".out*")] == []
    assert result.out == str(tmp_path / "out")


def test_a_store_whose_disk_is_full_at_the_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise sqlite_full(0)

    monkeypatch.setattr(Store, "_migrate", fill)
    with pytest.raises(ResourceError, match=r"b\.db' cannot be used .*full\)\. Free some space, or give another file"):
        Store(tmp_path / "b.db")


def test_a_disk_that_is_full_when_a_study_is_complete_changes_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Store.update

    def fill(self: Store, run: str, **values: Any) -> None:
        if values.get("state") == "done":
            raise sqlite_full(0)
        update(self, run, **values)

    monkeypatch.setattr(Store, "update", fill)
    short = {"tokens": 60, "length": 20, "eval_tokens": 64, "eval_length": 32, "self_share": 0.0}
    result = billhook.sweep(str(model), ["shortgpt"], remove="1blocks", data=str(text), out=tmp_path / "out",
                            store=tmp_path / "b.db", **short)  # fmt: skip
    assert Path(result.page).is_file()
    assert [run.state for run in billhook.list_runs(tmp_path / "b.db")] == ["done"]


def test_a_folder_that_is_taken_meanwhile_leaves_the_result_beside_it(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def take() -> None:
        out.mkdir()
        (out / "mine.txt").write_text("mine")

    at_stage(monkeypatch, "report", take)
    with pytest.raises(
        ResourceError, match=r"was taken while the run worked.*The result is complete, in .*out='FOLDER'"
    ):
        billhook.prune(str(model), data=str(text), out=out, store=tmp_path / "b.db", **SHORT)
    run = billhook.list_runs(tmp_path / "b.db")[0].run
    assert (tmp_path / f"out-{run}" / "model.safetensors").is_file()
    with pytest.raises(ResourceError, match="was taken"):
        billhook.resume(store=tmp_path / "b.db")
    stages: list[str] = []
    result = billhook.resume(
        out=tmp_path / "new", store=tmp_path / "b.db", watch=lambda event: stages.append(event.stage)
    )
    assert stages == []
    assert result.out == str(tmp_path / "new")
    assert '"out": ' in (tmp_path / "new" / "report.json").read_text()
    assert str(tmp_path / "new") in (tmp_path / "new" / "report.json").read_text()
    assert (out / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if "b.db" not in path.name) == ["new", "out"]
    assert billhook.load(tmp_path / "new").anatomy.total("bytes") == result.sizes.student.bytes


def test_a_folder_that_was_moved_resumes(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    tiny.with_tokenizer(work / "tiny")
    shutil.copy(text, work / "texts.jsonl")
    monkeypatch.chdir(work)

    def stop(event: Event) -> None:
        if event.stage == "evaluate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        billhook.prune(str(work / "tiny"), data="texts.jsonl", out=work / "out", store="b.db", watch=stop, **SHORT)
    monkeypatch.chdir(tmp_path)
    work.rename(tmp_path / "moved")
    with pytest.raises(RunError, match=f"Go there first: cd {tmp_path / 'moved'}"):
        billhook.resume(store="moved/b.db")
    monkeypatch.chdir(tmp_path / "moved")
    steps: list[object] = []
    result = billhook.resume(store="b.db", watch=lambda event: steps.append(event.values.get("step")))
    assert "fold" not in steps
    assert result.out == str(tmp_path / "moved" / "out")
    assert (tmp_path / "moved" / "out" / "config.json").is_file()


def test_folders_that_cannot_be_are_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("full").mkdir()
    Path("full", "mine").touch()
    Path("link").symlink_to("full")
    Path(".billhook-new").write_text("mine")
    for out, words in {
        "pipe": "is not a folder", "loop": "names no folder", "link": "is not empty", "/": "you are in",
        "..": "you are in", ".": "you are in", "": "names no folder", "-": "names no folder", "a\0b": "names no folder",
        "\udcff": "is not UTF-8", "n" * 250: "cannot be written", "pipe/x": "cannot be written",
        "~nobody-here/x": "names no folder",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=words):
            check_target(named_folder(out))
    Path("empty").mkdir()
    Path("to-empty").symlink_to("empty")
    Path("dangling").symlink_to("not-yet")
    for out in ("new", "to-empty", "dangling", "a/b/c", "empty/../new"):
        check_target(named_folder(out))
    assert Path(".billhook-new").read_text() == "mine"
    monkeypatch.setenv("HOME", str(here))
    assert named_folder("~/x") == here / "x"
    assert not Path("a").exists()


BROKEN: dict[str, Callable[[Path], object]] = {
    "template": lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}"),
    "generation": lambda folder: tiny.change_json(folder / "generation_config.json", penalty_alpha=0.6, top_k=4,
                                                  num_beams=3, cache_implementation="static", use_cache=False),
    "kernel": lambda folder: tiny.change_json(folder / "config.json", attn_implementation="flash_attention_2",
                                              use_cache=False, cache_implementation="static"),
}  # fmt: skip


UNREADABLE = {"no JSON": "{nope", "no object": "[1]", "no config": '{"watermarking_config": 7, "é": [1]}',
              "odd types": '{"eos_token_id": {"a": 1}, "temperature": "hot"}'}  # fmt: skip


@pytest.mark.parametrize("memory", [None, 1000], ids=["whole", "streamed"])
@pytest.mark.parametrize("content", list(UNREADABLE))
def test_a_generation_config_that_cannot_be_read_is_a_note(content: str, memory: int | None, tmp_path: Path) -> None:
    folder = tiny.with_tokenizer(tmp_path / "tiny")
    rows = torch.arange(12)[None]
    before = logits(billhook.load(folder, memory=memory), Plan(), rows)
    (folder / "generation_config.json").write_text(UNREADABLE[content], encoding="utf-8")
    events: list[Event] = []
    teacher = billhook.load(folder, memory=memory, watch=events.append)
    notes = [str(event.values["note"]) for event in events if "note" in event.values]
    assert len(notes) == (content != "odd types")
    assert all("Nothing is measured by it" in note for note in notes)
    assert torch.equal(logits(teacher, Plan(), rows), before)
    plan = Plan.parse(["mlp.1"])
    save(apply(teacher, plan), None, plan, tmp_path / "out", teacher=teacher)
    copied = tmp_path / "out" / "generation_config.json"
    assert copied.is_file() == (content not in ("no JSON", "no object"))
    assert not copied.is_file() or copied.read_bytes() == (folder / "generation_config.json").read_bytes()
    assert billhook.load(tmp_path / "out").removed_earlier


@pytest.mark.parametrize("broken", list(BROKEN))
def test_what_a_checkpoint_says_of_answers_and_kernels_does_not_end_a_run(
    broken: str, text: Path, tmp_path: Path
) -> None:
    folder = tiny.with_tokenizer(tmp_path / "tiny")
    options = {"data": str(text), "store": tmp_path / "b.db", **SHORT}
    whole = billhook.prune(str(folder), out=tmp_path / "whole", **options)
    BROKEN[broken](folder)
    result = billhook.prune(str(folder), out=tmp_path / "out", **options)
    assert result.answers == whole.answers
    assert result.speed is not None
    assert result.reasons == whole.reasons
    assert billhook.load(tmp_path / "out").model.config._attn_implementation == "sdpa"


def test_a_courtesy_that_fails_is_a_note(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("no voice")

    monkeypatch.setattr("billhook.runs.evaluation.sample_answers", fail)
    monkeypatch.setattr("billhook.runs.evaluation.compare_speed", fail)
    monkeypatch.setattr("billhook.runs.evaluation.skills_of", fail)
    result = billhook.prune(str(model), data=str(text), out=tmp_path / "out", store=tmp_path / "b.db", **SHORT)
    assert result.answers == ()
    assert (result.speed, result.skills) == (None, ())
    assert result.reasons[-3:] == ("no_answers", "no_speed", "no_skills")
    notes = [event.values.get("note") for event in billhook.show(result.run, tmp_path / "b.db").events]
    assert notes.count("left out: ValueError: no voice") == 3
    assert "Speed could not be measured" in (tmp_path / "out" / "report.html").read_text()


def other_words(folder: Path, text: Path) -> None:
    text.write_text(text.read_text().replace("w1", "w2"))


def other_template(folder: Path, text: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


CHANGED: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "chat template": ("chat template", other_template),
    "generation": ("generation settings", lambda folder, text: tiny.change_json(
        folder / "generation_config.json", eos_token_id=[2, 5])),
    "texts": ("tokens|text", other_words),
    "plan": ("plan", lambda folder, text: (folder.parent / "plan.txt").write_text("attention.2,mlp.2")),
}  # fmt: skip


@pytest.mark.parametrize("change", list(CHANGED))
def test_a_run_resumes_only_with_what_decides_its_result(
    change: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own, store = tiny.with_tokenizer(tmp_path / "tiny"), tmp_path / "texts.jsonl", tmp_path / "b.db"
    shutil.copy(text, own)
    (tmp_path / "plan.txt").write_text("attention.1,mlp.2")

    def stop() -> None:
        raise KeyboardInterrupt

    at_stage(monkeypatch, "evaluate", stop)
    passed = ("remove", "search")
    options = {name: value for name, value in SHORT.items() if name not in passed} | {
        "plan": str(tmp_path / "plan.txt")
    }
    with pytest.raises(KeyboardInterrupt):
        billhook.prune(str(folder), data=str(own), out=tmp_path / "out", store=store, **options)
    words, act = CHANGED[change]
    act(folder, own)
    with pytest.raises(FingerprintError, match=f"begun with another .*({words})"):
        billhook.resume(store=store)


def test_a_repair_that_was_made_of_another_plan_is_made_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    at_stage(monkeypatch, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        billhook.prune(str(model), data=str(text), out=tmp_path / "out", store=tmp_path / "b.db", **SHORT)
    (work,) = tmp_path.glob(".out.*.recovery")
    tiny.change_json(work / "1-fold.json", made_from="another plan")
    steps: list[object] = []
    billhook.resume(store=tmp_path / "b.db", watch=lambda event: steps.append(event.values.get("step")))
    assert "fold" in steps
