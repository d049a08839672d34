"""Memory of a device: what an operation took, and trying again with less where it ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from billhook.core.errors import ResourceError, option
from billhook.models.accelerator.spreading import devices_of
from billhook.models.device import device_module, free_memory

ATTEMPTS = 4  # of a piece of work: as it is, and three times with less
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or the CPU, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release_cached(device: torch.device) -> None:
    """Return to the device what its allocator holds and nobody uses."""
    gc.collect()  # tensors of the failed work may hang in a ring of frames
    module = device_module(device)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


def with_less(work: Callable[[], T], shrink: Callable[[], None], device: torch.device) -> T:
    """Return work(). Where memory runs out, call `shrink` and try again, three times.

    Raises ResourceError if memory runs out once more.
    """
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        if attempt < ATTEMPTS - 1:
            shrink()
            release_cached(device)
    raise ResourceError(
        f"Out of memory on {device}, {ATTEMPTS} times, each time with half the work: {reason} "
        f"{free_memory(device) / 1e9:,.1f} GB are free. Use fewer {option('tokens')}, a shorter {option('length')}, "
        f"{option('dtype', 'bfloat16')}, or a budget below what is free: {option('memory')}."
    )


def peak_of(work: Callable[[], Any], model: Any) -> int | None:
    """Return the most bytes that a model's devices hold while it works, without what others hold there.

    None where a device does not count. Source: the peak of its allocator, less what was allocated before, and the
    model's own tensors. Peaks of several devices are summed, though they need not come at the same moment.
    """
    devices = devices_of(model)
    module = device_module(devices[0])
    if module is None or not hasattr(module, "reset_peak_memory_stats"):
        return None
    own = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}  # tied ones once
    release_cached(devices[0])
    before = {device: int(module.memory_allocated(device)) for device in devices}
    for device in devices:
        module.reset_peak_memory_stats(device)
    work()
    peak = sum(int(module.max_memory_allocated(device)) - before[device] for device in devices)
    return sum(map(int, own.values())) + peak
