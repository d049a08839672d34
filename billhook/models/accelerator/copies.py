"""Copies of weights to a device beside its work: from pinned memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from billhook.models.device import device_module


class SideCopies:
    """Copies from host memory to one device that do not wait for its kernels, nor they for the copies.

    Pinned buffers come from torch's host allocator, which hands one out again once its copy has ended: while a block
    is read, two of them are in use. On a device without streams a copy is a plain one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, device_module(device)
        self._stream: Any | None = None
        if self._module is not None and hasattr(self._module, "Stream"):
            self._stream = self._module.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the calling thread's work for the device, and its allocations, are on the side stream."""
        if self._stream is None or self._module is None:
            yield
            return
        with self._module.stream(self._stream):
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor of host memory to one on the device, which may be of another dtype."""
        if self._stream is None:
            target.copy_(source)
            return
        staged = torch.empty(source.shape, dtype=target.dtype, pin_memory=True).copy_(source)  # cast by the CPU
        target.copy_(staged, non_blocking=True)

    def mark(self) -> Any | None:
        """Return an event that the copies so far precede; None without streams."""
        return None if self._stream is None else self._stream.record_event()

    def receive(self, event: Any | None, tensors: Iterable[torch.Tensor]) -> None:
        """Have the caller's kernels wait, on the device, for an event; the tensors live until those kernels end."""
        if event is None or self._module is None:
            return
        current = self._module.current_stream(self.device)
        current.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(current)
