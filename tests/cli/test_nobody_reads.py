"""Progress that nobody reads ends no run, and does not change its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def started(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "billhook", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | ENV, **options)


def pruning(model: Path, text: Path, folder: Path) -> tuple[object, ...]:
    return ("prune", model, "--remove", "1sites", "--search", "oneshot", "--data", text, "--tokens", 160,
            "--length", 20, "--eval-tokens", 256, "--eval-length", 32, "--self-share", 0, "--proof", "loss",
            "--store", folder / "b.db", "--out", folder / "out")  # fmt: skip


@pytest.mark.parametrize("stderr", ["closed", "full", "unread"])
def test_a_stderr_that_takes_nothing_ends_no_run(stderr: str, model: Path, text: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    if stderr == "full":
        write = os.open("/dev/full", os.O_WRONLY)
    if stderr == "closed":
        command = f'exec "{sys.executable}" -m billhook ' + " ".join(
            f"'{each}'" for each in pruning(model, text, tmp_path)
        )
        run = subprocess.Popen(["sh", "-c", command + " --json 2>&-"], env=os.environ | ENV, stdout=subprocess.PIPE)
    else:
        run = started(*pruning(model, text, tmp_path), "--json", stdout=subprocess.PIPE, stderr=write)
    os.close(read)
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert out.startswith(b"{")
    assert (tmp_path / "out" / "config.json").is_file()
    os.close(write)


def test_a_terminal_that_is_closed_ends_no_run(model: Path, text: Path, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    run = started(
        *pruning(model, text, tmp_path), stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    )
    os.close(follower)
    os.read(leader, 1)  # the first words of its progress
    os.close(leader)
    time.sleep(0.1)
    run.send_signal(signal.SIGHUP)
    run.wait(timeout=300)
    assert (tmp_path / "out" / "config.json").is_file()
