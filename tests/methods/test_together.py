"""Several processes train what one trains, whoever is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_recover import PLAN, many_texts

from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.engine.workers.lines import Hiring, Inbox, Line
from billhook.engine.workers.messages import Hello, Lost, Message, Start, hello_of
from billhook.engine.workers.processes import ProcessLine, hiring
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.methods.recover.together import train_together
from billhook.models.accelerator import share as shares
from billhook.models.accelerator.share import ALONE, ProcessLost, Share, joined
from billhook.models.load import Teacher, load
from billhook.models.repair import Repair

Folder = Callable[[str], Path]
OWN = {"epochs": 3, "batch": 5}  # rows per step, which two processes cannot halve
ROWS, VALID = 25, 3


def hearing(heard: list[Event]) -> Callable[[Event], None]:
    return heard.append


def checks(heard: list[Event]) -> list[float]:
    return [float(event.values["best"]) for event in heard if "best" in event.values]


def same(found: Any, expected: Repair) -> None:
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5)


# -- shares ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_are_all_rows_in_order_and_nearly_equal(count: int, processes: int) -> None:
    parts = [Share(rank, processes).part(count) for rank in range(processes)]
    assert [row for part in parts for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


def test_a_group_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """With one process everything is its own; the state that libraries share, and the environment, come back."""
    from accelerate import PartialState

    before, rows = dict(os.environ), torch.arange(6.0).view(3, 2)
    for earlier in (False, True):
        if earlier:
            PartialState(cpu=True)
        state = {**vars(PartialState())} if earlier else {}
        with joined(Share(), tmp_path / f"meeting {earlier}"):
            assert torch.distributed.get_backend() == "gloo"
            assert PartialState().num_processes == 1
            with (
                pytest.raises(UsageError, match=r"belongs to a group of torch\.distributed"),
                joined(ALONE, tmp_path / "x"),
            ):
                pass
        assert not torch.distributed.is_initialized()
        assert dict(os.environ) == before
        assert PartialState.__new__(PartialState).initialized == earlier
        assert not earlier or vars(PartialState()) == state
        if earlier:
            vars(PartialState()).clear()
    assert torch.equal(ALONE.gather([rows[:1], rows[1:]], 3), rows)
    assert ALONE.add([1.0, 2.0]) == [1, 2]
    assert ALONE.of_first(3) == 3


def test_who_waits_for_a_process_that_is_lost_is_told(tmp_path: Path) -> None:
    share = Share(0, 2)
    share.lost.set()
    with pytest.raises(ProcessLost), joined(share, tmp_path / "meeting"):
        pass
    assert not torch.distributed.is_initialized()


@given(st.lists(st.integers(0, 30), max_size=12))
def test_buckets_are_all_tensors_in_order_and_small(sizes: list[int]) -> None:
    tensors = [torch.zeros(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "BUCKET", 20)
        buckets = list(shares._buckets(tensors))
    assert [id(each) for some in buckets for each in some] == [*map(id, tensors)]
    assert all(len(some) == 1 or sum(each.numel() for each in some) <= 20 for some in buckets)


# -- trainings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "own"), [("lora", {"loss": "kl"}), ("partial", {"loss": "mse"})])
def test_two_processes_train_what_one_trains(
    name: str, own: dict[str, Any], checkpoint: Folder, tmp_path: Path
) -> None:
    """The same parameters, the same losses at every validation, and half of the work."""
    teacher, texts = load(checkpoint("llama")), (many_texts(ROWS), many_texts(VALID, seed=9))
    alone, shared = list[Event](), list[Event]()
    expected = RECOVERIES[name](RecoveryTask(teacher, PLAN, watch=hearing(alone)), *texts, **OWN | own)
    task = RecoveryTask(teacher, PLAN, work=tmp_path, watch=hearing(shared))
    with torch.random.fork_rng():
        same(train_together(name, hiring(2, teacher), task, texts, OWN | own), expected)
    assert len(set(checks(alone))) > 2, "it learned"
    assert checks(shared) == pytest.approx(checks(alone), rel=1e-5)
    losses = [[event.values["loss"] for event in heard if "loss" in event.values] for heard in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    passed = [event.total for event in shared if event.values.get("step") == "teacher_outputs"]
    assert {*passed} == {-(-ROWS // 2), -(-VALID // 2)}
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"teacher"}
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


def caught(lines: list[Line], teacher: Teacher) -> Hiring:
    """Two processes, whose line is kept."""
    usual = hiring(2, teacher)

    def hire(inbox: Inbox) -> Sequence[Line]:
        lines[:] = usual.hire(inbox)
        return lines

    return replace(usual, hire=hire)


def test_a_process_that_is_killed_ends_the_training_which_resumes(checkpoint: Folder, tmp_path: Path) -> None:
    teacher, texts = load(checkpoint("llama")), (many_texts(ROWS), many_texts(VALID, seed=9))
    expected = RECOVERIES["bias"](RecoveryTask(teacher, PLAN), *texts, **OWN)
    lines, steps = list[Line](), list[int]()

    def watch(event: Event) -> None:
        if "best" in event.values:
            steps.append(event.done)
            if len(steps) == 6:
                assert isinstance(lines[0], ProcessLine)
                lines[0].process.kill()

    task = RecoveryTask(teacher, PLAN, work=tmp_path, watch=watch, save_every=0.0)
    with pytest.raises(ProcessLost, match="signal 9"):
        train_together("bias", caught(lines, teacher), task, texts, OWN)
    assert steps[-1] < 15, "of all"
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left == {"teacher", "training.pt"}, "nothing half-written"
    begun = len(steps)
    with torch.random.fork_rng():
        same(train_together("bias", caught(lines, teacher), task, texts, OWN), expected)
    assert steps[begun] == steps[begun - 1] + 1, "from the last checkpoint on"
    process = lines[0]
    assert isinstance(process, ProcessLine)
    assert isinstance(process.process, subprocess.Popen)
    assert process.process.returncode is not None


class Saying:
    """A worker that says who it is, and that it is lost for a reason when it is to take part."""

    def __init__(self, inbox: Inbox, hello: Hello, reason: str) -> None:
        self.inbox, self.hello, self.reason = inbox, hello, reason

    def send(self, message: Message) -> None:
        self.inbox.put((1, self.hello if isinstance(message, Start) else Lost(self.reason)))

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("OutOfMemoryError: CUDA out of memory", MemoryError), ("RuntimeError: no", ProcessLost)],
)
def test_a_process_without_memory_is_as_if_this_one_had_none(
    reason: str, kind: type[Exception], checkpoint: Folder, tmp_path: Path
) -> None:
    """So that the training is tried again with less; any other reason is told."""
    teacher, texts = load(checkpoint("llama")), (many_texts(4), many_texts(2))
    hired = Hiring(1, lambda inbox: [Saying(inbox, hello_of(teacher), reason)])
    with pytest.raises(kind, match=reason):
        train_together("bias", hired, RecoveryTask(teacher, PLAN, work=tmp_path), texts, OWN)
    assert not list(tmp_path.iterdir())


def test_where_every_other_process_is_refused_this_one_trains_alone(checkpoint: Folder, tmp_path: Path) -> None:
    teacher, texts, heard = load(checkpoint("llama")), (many_texts(4), many_texts(2)), list[Event]()
    other = replace(hello_of(teacher), model="another")
    hired = Hiring(1, lambda inbox: [Saying(inbox, other, "")])
    task = RecoveryTask(teacher, PLAN, work=tmp_path, watch=hearing(heard))
    found = train_together("bias", hired, task, texts, OWN)
    same(found, RECOVERIES["bias"](RecoveryTask(teacher, PLAN), *texts, **OWN))
    assert "model another" in str(heard[0].values["refused"])
