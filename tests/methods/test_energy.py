"""Energy counters: a folder as the kernel writes it, a driver that is a fake, and what joules become."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import tiny
import torch

import billhook
from billhook.core.results.measured import EnergyCounters, Timing, TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.methods.evaluate.speed import rates, run_phases, speed_ratio, time_interleaved
from billhook.models.device import environment
from billhook.report.timing.words import energy_words
from billhook.runtimes.energy import Counter, Laps, Meter, Phases, machine_meter, nvml_counter, rapl_counters

RANGE_UJ = 262_143_328_850


def zone(folder: Path, name: str, kind: str, microjoules: int | None) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    (place / "name").write_text(f"{kind}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    if microjoules is not None:
        (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


# -- counters --------------------------------------------------------------------------------------------------------


def test_packages_and_memory_are_counted_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:0:0": ("core", 3_000_000),
        "intel-rapl:0:1": ("uncore", 1_000_000), "intel-rapl:0:2": ("dram", 700_000),
        "intel-rapl:1": ("package-1", 2_000_000), "intel-rapl:2": ("psys", 9_000_000),
        "intel-rapl-mmio:0": ("package-0", 5_000_000), "intel-rapl": ("intel-rapl", 0),
    }  # fmt: skip
    files = {name: zone(tmp_path, name, *about) for name, about in zones.items()}
    meter = rapl_counters(tmp_path)
    assert [counter.name for counter in meter.counters] == ["package-0", "dram 0:2", "package-1"]
    before = meter.read()
    assert before == (5.0, 0.7, 2.0)
    for file in files.values():
        file.write_text(str(int(file.read_text()) + 250_000))
    assert meter.joules(before, meter.read()) == pytest.approx(3 * 0.25)


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_500_000)
    meter = rapl_counters(tmp_path)
    before = meter.read()
    file.write_text("500000")
    assert meter.joules(before, meter.read()) == pytest.approx(2.0)


def test_a_counter_that_may_not_be_read_is_named_and_not_used(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    unreadable = zone(tmp_path, "intel-rapl:1", "package-1", None)
    unreadable.mkdir()  # which even an administrator cannot read as a file
    meter = machine_meter(folder=tmp_path)
    assert ([counter.name for counter in meter.counters], meter.unreadable) == (["package-0"], ("package-1",))
    assert machine_meter(folder=tmp_path / "none") == Meter()
    assert Meter().read() is None


class FakeNvml:
    """The functions of NVML that are called, of a GPU that uses 2.5 J between two readings."""

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.millijoules = broken, count(1_000_000, 2500)

    def nvmlInit(self) -> None:  # noqa: N802 - a name of NVML's
        if self.broken == "init":
            raise self.NVMLError("no driver")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - a name of NVML's
        assert uuid == "GPU-1234"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802 - a name of NVML's
        if self.broken == "energy":
            raise self.NVMLError("not supported")
        return next(self.millijoules)


@pytest.mark.parametrize("uuid", ["1234", "GPU-1234"])
def test_a_gpu_is_counted_in_joules(uuid: str) -> None:
    meter = nvml_counter(uuid, FakeNvml())
    assert [counter.name for counter in meter.counters] == ["GPU"]
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(2.5)
    for broken in ("init", "energy"):
        assert nvml_counter(uuid, FakeNvml(broken)) == Meter()


def test_reading_counters_is_no_part_of_a_phase() -> None:
    """A clock that stands still but for readings, which take a second each."""
    now = [0.0]

    def read() -> float:
        now[0] += 1.0
        return now[0]

    laps = Laps(Meter((Counter("slow", read),)), lambda: now[0])
    now[0] += 0.25
    laps.lap()
    now[0] += 0.5
    laps.lap()
    assert laps.phases() == Phases(0.25, 0.5, pytest.approx(1.25), pytest.approx(1.5))  # type: ignore[arg-type]


def test_a_counter_that_fails_leaves_the_times() -> None:
    readings = iter([1.0, 2.0])
    laps = Laps(Meter((Counter("gone", lambda: next(readings)),)))
    laps.lap()
    laps.lap()
    found = laps.phases()
    assert (found.prefill_j, found.decode_j) == (1.0, None)
    assert found.decode_s >= 0


# -- joules per token ------------------------------------------------------------------------------------------------


def test_joules_are_counted_while_models_are_timed(tmp_path: Path) -> None:
    """Of a counter that each forward pass advances: as many joules as passes, and the prompt is one."""
    folder = tiny.saved(tmp_path / "model", "llama")
    model, used = billhook.load(folder).model, [0.0]
    model.register_forward_hook(lambda *_: used.__setitem__(0, used[0] + 1.0))
    meter = Meter((Counter("passes", lambda: used[0]),))
    found = run_phases(model, torch.zeros(1, 4, dtype=torch.int64), 3, meter)
    assert (found.prefill_j, found.decode_j) == (1.0, 3.0)
    protocol = TimingProtocol(prompt_tokens=4, new_tokens=3, repeats=6)
    first, second = time_interleaved((model, model), (folder, folder), protocol, meter=meter)
    assert (first.prefill_j, first.decode_j) == ((1.0,) * 6, (3.0,) * 6)
    told = rates(first)
    assert told.decode_joules is not None
    assert told.prefill_joules is not None
    assert (told.decode_joules.value, told.prefill_joules.value, told.decode_joules.n) == (1.0, 0.25, 6)
    ratio = speed_ratio(first, second).decode_joules
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
    without = time_interleaved((model,), (folder,), protocol, meter=Meter())[0]
    assert (without.decode_j, rates(without).decode_joules) == ((), None)


def timing(decode_j: tuple[float, ...], tokens: int = 4) -> Timing:
    n = len(decode_j) or 6
    return Timing((1.0,) * n, (1.0,) * n, 8, tokens, 1, None, prefill_j=(8.0,) * len(decode_j), decode_j=decode_j)


def test_intervals_of_joules_are_those_of_student() -> None:
    joules = (4.0, 8.0, 0.0, 4.0, 8.0, 4.0, 6.0)  # a counter with steps
    found = rates(timing(joules)).decode_joules
    assert found is not None
    each = [x / 4 for x in joules]
    low, high = scipy.stats.t.interval(0.95, 6, statistics.mean(each), statistics.stdev(each) / 7**0.5)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((statistics.mean(each), low, high, 7))
    other = tuple(2 * x for x in joules)
    ratio = speed_ratio(timing(joules), timing(other)).decode_joules
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0)), "in pairs"
    few = rates(timing((4.0, 8.0))).decode_joules
    assert few is not None
    assert (few.low, few.high, few.reason) == (1.0, 2.0, "few_runs")
    assert rates(timing((0.0,) * 6)).decode_joules is None, "the counter did not move"
    assert speed_ratio(replace(timing(joules), decode_j=()), timing(joules)).decode_joules is None


@pytest.mark.parametrize(
    ("counters", "counted", "words"),
    [
        (EnergyCounters(), False, ["No energy counter on this machine."]),
        (EnergyCounters((), ("package-0",)), False, ["Only the administrator of this machine may read its energy"]),
        (
            EnergyCounters(("package-0", "GPU")),
            True,
            ["a: 1 J (1–1) per token decoded", "package-0 and GPU"],
        ),
        (EnergyCounters(("package-0",)), False, ["did not move"]),
        (None, False, []),
    ],
)
def test_what_is_told_of_energy(counters: Any, counted: bool, words: list[str]) -> None:
    row = ModelRates("a", rates(timing((4.0,) * 6 if counted else ())))
    report = SpeedReport((row,), TimingProtocol(), environment("cpu"), energy=counters)
    told = energy_words(report)
    assert len(told) == len(words)
    assert all(part in line for part, line in zip(words, told, strict=True)), told
    assert SpeedReport.from_json(report.to_json()) == report
