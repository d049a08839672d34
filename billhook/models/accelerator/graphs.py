"""Graphs of kernels: work that a device repeats without the CPU. CUDA has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from billhook.models.device import synchronised_time


def captures_graphs(device: torch.device) -> bool:
    """Return whether a device records kernels as a graph."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Graph:
    """Recorded work."""

    recorded: Any
    device: torch.device

    def seconds(self, times: int) -> float:
        """Return the seconds of so many repetitions."""
        start = synchronised_time(self.device)
        for _ in range(times):
            self.recorded.replay()
        return synchronised_time(self.device) - start


def capture(work: Callable[[], None], warm_ups: int, device: torch.device) -> Graph:
    """Return the graph of `work`, after a few runs of it. Raises RuntimeError where it waits for the device."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        work()
    return Graph(recorded, device)
