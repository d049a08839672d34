"""The process that measures peak memory takes code from nowhere but where ours comes from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import billhook
from billhook.methods.evaluate import speed
from billhook.models import device

OURS = speed.peak_bytes  # as it is before conftest's fixture replaces it for other tests


@pytest.mark.parametrize("where", ["working folder", "folder of the model"])
def test_no_code_of_the_working_folder_or_the_models_is_run(
    where: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, here = tmp_path / "model", tmp_path / "here"
    here.mkdir()
    model.mkdir()
    for file in checkpoint("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    trap = here if where == "working folder" else model
    for name in ("sitecustomize", "usercustomize", "torch", "json", "transformers", "billhook"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(here)
    home = str(Path(billhook.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(trap), home]))
    assert (OURS(model, "cpu", "float32", 8, 2) or 0) > 0
    assert not (tmp_path / "ran").exists()


def test_other_places_of_the_path_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "lib", str(tmp_path), "/opt/own", str(tmp_path / "m" / "x")]))
    entries = device.child_environment(tmp_path / "m")["PYTHONPATH"].split(os.pathsep)
    assert entries[-1] == "/opt/own"
    assert str(tmp_path) not in entries
