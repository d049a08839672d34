"""The pretended device is as strict as a GPU, and counts."""

from __future__ import annotations

import gc

import places
import pytest
import torch
from pretended import NAME, pretended

from billhook.models.device import pick_device


def test_devices_do_not_mix() -> None:
    with pretended():
        x = torch.ones(3).to(NAME)
        assert x.device.type == NAME
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="host memory"):
            x.numpy()
        with pytest.raises(AssertionError, match="generator"):
            torch.randn(3, device=NAME, generator=torch.Generator())
        assert (x + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]  # numbers may come from the CPU
        assert x[torch.tensor([0, 1])].shape == (2,)  # and so may indices


def test_waits_are_counted_and_kernels_are() -> None:
    with pretended() as costs:
        x = torch.arange(6.0).to(NAME)
        costs.reset()
        y = (x * 2 + 1)[:4].view(2, 2)
        assert (costs.kernels, costs.waited) == (2, 0)
        waits = (
            lambda: float(y.sum()), lambda: y.cpu(), lambda: y.tolist(), lambda: x[x > 2], lambda: (x > 2).nonzero(),
            lambda: torch.ones(2).to(NAME), lambda: torch.equal(x, x), lambda: bool((x > 9).any()),
            lambda: torch.tensor([1.0, 2.0], device=NAME),
        )  # fmt: skip
        for number, wait in enumerate(waits, 1):
            wait()
            assert costs.waited == number, number
        x.index_select(0, (x[:2]).long())
        torch.ones(2).to(NAME, non_blocking=True)
        assert costs.waited == len(waits)


def test_memory_is_counted_and_limited() -> None:
    gc.collect()
    with pretended(limit=10_000) as costs:
        before = costs.live
        x = torch.zeros(1000, device=NAME)
        view = x[:10].view(2, 5)
        assert costs.live - before == 4000
        del x
        assert costs.live - before == 4000
        del view
        assert costs.live == before
        assert costs.peak == before + 4000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(4000, device=NAME)


def test_an_apple_gpu_has_no_float64() -> None:
    with pretended(float64=False), pytest.raises(TypeError, match="float64"):
        torch.ones(2).to(NAME).double()


def test_tests_leave_a_gpu_alone_and_those_of_a_gpu_want_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if places.ASKED:
        return
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(places, "ASKED", "auto")
    with pytest.raises(pytest.UsageError, match="Run `make test`, which pretends one"):
        places.real_device()
