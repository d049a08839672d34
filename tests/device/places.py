"""Where the contract of devices is tested: on the pretended device, or by BILLHOOK_TEST_DEVICE on one that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from pretended import pretended

from billhook.models import load as loading
from billhook.models.accelerator import spreading
from billhook.models.device import device_count, pick_device
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


FIRST, SECOND, CPU = "pretended:0", "pretended:1", "cpu"  # of two devices that refuse to meet
Pair = tuple[str, str]


@contextmanager
def spread_over(pair: Pair) -> Iterator[None]:
    """Inside, `load` spreads models over two devices: pretended ones, or those that are there.

    Where only one GPU is there, the CPU is the second.
    """
    place = real_device()
    if place is None:
        with pretended(devices=pair):
            yield
        return
    second = torch.device(place.type, 1) if device_count(place) > 1 else torch.device(CPU)
    found = tuple({FIRST: place, SECOND: second, CPU: torch.device(CPU)}[name] for name in pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "pick_devices", lambda name: found)
        patch.setattr(spreading, "free_memory", lambda device: 2**30)
        yield


def on_two(work: Callable[[Teacher], T], folder: Path, pair: Pair) -> tuple[T, T]:
    """Return what `work` makes of a teacher whose blocks lie on two devices, and of one on the CPU; in float32."""
    here = work(load(folder, device="cpu", dtype="float32"))
    with spread_over(pair):
        teacher = load(folder, dtype="float32")
        assert len(teacher.devices) == 2
        return work(teacher), here
