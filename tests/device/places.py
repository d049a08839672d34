"""Where the contract of devices is tested: on the pretended device, or by BILLHOOK_TEST_DEVICE on one that is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from pretended import pretended

from billhook.models.device import pick_device
from billhook.models.load import Teacher, load

ASKED = os.environ.get("BILLHOOK_TEST_DEVICE", "")  # auto, cuda, cuda:1, mps …; empty: the pretended device
HELP = (
    "BILLHOOK_TEST_DEVICE={asked}: this machine has no GPU that torch sees. Run `make test`, which pretends one; or "
    "install a build of torch for your GPU (https://pytorch.org/get-started) and run `make test-gpu` again."
)
T = TypeVar("T")


def real_device() -> torch.device | None:
    """Return the device to test on; None for the pretended one. Raises pytest.UsageError where the machine lacks it."""
    if not ASKED:
        return None
    place = pick_device("auto")
    if place.type == "cpu":
        raise pytest.UsageError(HELP.format(asked=ASKED))
    return place if ASKED == "auto" else pick_device(ASKED)


def both(work: Callable[[Teacher], T], folder: Path, *, float64: bool = True, memory: int | None = None) -> tuple[T, T]:
    """Return what `work` makes of a teacher on the device, and of one on the CPU; both in float32."""
    place = real_device()
    here = work(load(folder, device="cpu", dtype="float32", memory=memory))
    if place is not None:
        return work(load(folder, device=str(place), dtype="float32", memory=memory)), here
    with pretended(float64=float64):
        return work(load(folder, dtype="float32", memory=memory)), here
