"""Energy counters of a machine, read beside the clock: RAPL of Linux, and NVML of a GPU. No torch.

A counter counts what its whole part of the machine uses, whoever uses it.

Source: the kernel's documentation of power capping (zones, microjoules, wrap-around at `max_energy_range_uj`), and
NVIDIA's of `nvmlDeviceGetTotalEnergyConsumption` (millijoules since the driver was loaded).
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
Timed = tuple[float, float, float | None, float | None]  # seconds of both phases, joules of both
NVML = "pynvml"  # the module of the distribution nvidia-ml-py


@dataclass(frozen=True, slots=True)
class Counter:
    """One counter: `read` returns joules that only grow, but for a wrap-around to 0 at `wraps_at` joules."""

    name: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Return the joules between two readings, of which the second may have wrapped around once."""
        return after - before + (self.wraps_at or 0.0) if after < before else after - before


@dataclass(frozen=True, slots=True)
class Meter:
    """The counters that can be read, and the names of those that this user may not read."""

    counters: tuple[Counter, ...] = ()
    unreadable: tuple[str, ...] = ()

    def read(self) -> tuple[float, ...] | None:
        """Return what every counter says now; None without counters, or where one fails."""
        try:
            return tuple(counter.read() for counter in self.counters) or None
        except Exception:  # what a driver raises has many types, and a time is worth more than a joule
            return None

    def joules(self, before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> float | None:
        """Return the joules of all counters between two readings; None where one of them failed."""
        if before is None or after is None:
            return None
        return sum(c.between(a, b) for c, a, b in zip(self.counters, before, after, strict=True))


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds and joules of a prefill and of the decoding steps after it; joules are None where nothing counts them."""

    prefill_s: float
    decode_s: float
    prefill_j: float | None = None
    decode_j: float | None = None

    def numbers(self) -> Timed:
        """Return the four numbers."""
        return self.prefill_s, self.decode_s, self.prefill_j, self.decode_j


class Laps:
    """Clock and counters at the beginning, between the two phases, and at the end."""

    def __init__(self, meter: Meter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock = meter, clock
        self._seconds: list[float] = []
        self._readings = [meter.read()]
        self._start = clock()

    def lap(self) -> None:
        """End a phase. Reading the counters takes time, which no phase is charged with."""
        self._seconds.append(self._clock() - self._start)
        self._readings.append(self._meter.read())
        self._start = self._clock()

    def phases(self) -> Phases:
        """Return the two phases that were ended."""
        joules = [self._meter.joules(a, b) for a, b in zip(self._readings, self._readings[1:], strict=False)]
        return Phases(self._seconds[0], self._seconds[1], joules[0], joules[1])


def rapl_counters(folder: Path = POWERCAP) -> Meter:
    """Return the counters of processor packages and of their memory. Zones inside a package are part of it.

    A zone `psys` counts the packages again, and is left out.
    """
    counters, unreadable = [], []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if not name.startswith("package") and name != "dram":
            continue
        name = f"{name} {zone.name.partition(':')[2]}" if name == "dram" else name
        try:
            wraps_at = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
            counter = Counter(name, _microjoules(zone / "energy_uj"), wraps_at)
            counter.read()
        except (OSError, ValueError):
            unreadable.append(name)
            continue
        counters.append(counter)
    return Meter(tuple(counters), tuple(unreadable))


def _microjoules(file: Path) -> Callable[[], float]:
    def read() -> float:
        return int(file.read_text(encoding="ascii")) / 1e6

    return read


def nvml_counter(uuid: str, nvml: Any = None) -> Meter:
    """Return the counter of one NVIDIA GPU, by its UUID; none without nvidia-ml-py, or where the GPU has none.

    `nvml`: the module; None: the one that is installed.
    """
    if nvml is None:
        if importlib.util.find_spec(NVML) is None:
            return Meter()
        nvml = importlib.import_module(NVML)
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        counter = Counter("GPU", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        counter.read()
    except nvml.NVMLError:
        return Meter()
    return Meter((counter,))


def machine_meter(gpu: str = "", folder: Path = POWERCAP) -> Meter:
    """Return all counters of this machine: of the processors, and of the GPU with the UUID `gpu`, if any."""
    processors = rapl_counters(folder)
    counters = (*processors.counters, *(nvml_counter(gpu).counters if gpu else ()))
    return Meter(counters, processors.unreadable)
