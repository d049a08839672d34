"""A run whose trainings several workers carry out ends as one without, also where one of them is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from test_shared_runs import ended

import billhook
from billhook.cli.progress import event_words
from billhook.core.errors import ResourceError
from billhook.core.events import Event
from billhook.runs.recovery import training_processes

SHORT: dict[str, Any] = {
    "plan": "attention.1,mlp.2", "tokens": 64, "length": 32, "self_share": 0.0, "eval_tokens": 256, "eval_length": 32,
    "recover": "fold,lora", "recover_tokens": 640, "recover_length": 32,
    "recover_set": ["lora.epochs=3", "lora.rate=0.01", "lora.loss=nll"],
}  # fmt: skip


def workers() -> list[psutil.Process]:
    """The processes that this one has started to work with it."""
    return [each for each in psutil.Process().children() if "billhook.engine.workers.worker" in each.cmdline()]


@pytest.mark.parametrize(
    ("asked", "name", "rows", "count", "words"),
    [
        (1, "lora", 40, 1, ""),
        (4, "fold", 40, 1, ""),
        (2, "lora", 40, 2, ""),
        (8, "partial", 40, 8, ""),
        (4, "lora", 40, 2, "2 of 4 for lora, which has 2 rows per step; all with --recover-set lora.batch=4"),
        (4, "partial", 3, 3, "3 of 4 for partial, which has 3 rows per step; all with --recover-set partial.batch=4"),
        ("ray:n=3", "lora", 40, 1, "lora trains in this process alone; workers of ray share searches only"),
    ],
)
def test_as_many_processes_train_as_a_step_has_rows(
    asked: int | str, name: str, rows: int, count: int, words: str
) -> None:
    found, note = training_processes(asked, name, {}, rows)
    assert found == count
    assert (event_words(note.stage, note.values) if note else "") == words


def test_a_run_whose_training_lost_a_process_says_what_to_type_and_resumes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = billhook.prune(model, out="whole", data=text, store="whole.db", **SHORT)
    killed: list[int] = []

    def watch(event: Event) -> None:
        if "best" in event.values and event.done == 4:
            killed.extend(each.pid for each in workers())
            for each in workers():
                each.kill()

    with pytest.raises(ResourceError, match=r"trained lora was lost \(signal 9.*resume\('.*', workers=1\)") as told:
        billhook.prune(model, out="out", data=text, store="b.db", workers=2, watch=watch, **SHORT)
    assert len(killed) == 1
    assert all(map(ended, killed))
    (run,) = billhook.list_runs("b.db")
    assert f"billhook prune --resume --run {run.run} --workers 1" in told.value.message
    assert not (tmp_path / "out").exists()
    (work,) = tmp_path.glob(".out.*.recovery")
    left = [path.name for path in work.rglob("*") if path.is_file()]
    assert "1-fold.safetensors" in left
    assert not [name for name in left if name.endswith(".partial") or name == "repair.safetensors"]
    got = billhook.resume(store="b.db", workers=1)
    assert [each.recovery for each in got.recoveries] == ["fold", "lora"]
    for found, expected in zip(got.recoveries, whole.recoveries, strict=True):
        assert found.on["held-out"].after == pytest.approx(expected.on["held-out"].after, rel=1e-5)
    assert got.recoveries[1].on["held-out"].after != got.recoveries[1].on["held-out"].before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "out", "whole", "whole.db"]
