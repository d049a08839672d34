"""The benchmark of a GPU runs its steps on a device, says what it skips, and goes on after a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import NAME, pretended

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_step_runs_on_the_pretended_device(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pick_device", lambda name: torch.device(NAME, 0))
    monkeypatch.setattr(gpu, "environment", lambda device: device)
    monkeypatch.setitem(gpu.SIZES, "tiny", (2, 32, 48, 2, 1, 300))
    monkeypatch.setattr(gpu, "BATCHES", (2,))
    written = gpu.make_checkpoint.write
    monkeypatch.setattr(gpu.make_checkpoint, "write", lambda given: (setattr(given, "device", "cpu"), written(given)))
    out = tmp_path / "told.jsonl"
    with pretended():
        gpu.main(["--small", "--out", str(out), "--steps", "search,decoding,streaming,lora"])
    told = lines(out)
    assert [line["step"] for line in told] == ["where", "search", "decoding", "streaming", "lora"]
    assert not [line for line in told if "failed" in line]
    assert told[1]["peak_bytes"] > told[1]["weight_bytes"]
    assert told[4]["bytes_beside_the_teacher"] > 0


def test_what_does_not_fit_is_skipped_and_what_fails_is_said(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(session: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.STEPS, "losses", (fails, 1.0))
    out = tmp_path / "told.jsonl"
    gpu.main(["--device", "cpu", "--seconds", "5", "--steps", "losses,search", "--out", str(out)])
    told = lines(out)
    assert told[1]["failed"] == "RuntimeError: no such kernel"
    assert "s are left" in told[2]["skipped"]
