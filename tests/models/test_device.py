"""Facts of this machine's CPU; those of a GPU where there is one."""

from __future__ import annotations

import ast
import re
import time
from pathlib import Path

import psutil
import pytest
import torch

from billhook.models import device

HOUSE = Path(__file__).resolve().parents[2] / "billhook"
CPU = torch.device("cpu")


def test_facts_of_devices_stand_in_one_place() -> None:
    """Calls into torch's devices, psutil and the allocator. Errors in the words of torch are no facts.

    models/accelerator/ is for what differs on a GPU, runtimes/memory.py for processes without torch.
    """
    wanted = re.compile(r"torch\.(cuda|mps|backends)\.|psutil\.virtual|mallopt|ru_maxrss|fork_rng\(devices=\[[^\]]")
    found = []
    for path in sorted(HOUSE.rglob("*.py")):
        facts = path.name in ("device.py", "memory.py") or path.parent.name == "accelerator"
        lines = [] if facts else path.read_text().splitlines()
        found += [f"{path.name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if wanted.search(line)]
        tree = ast.parse("\n".join(lines))
        found += [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree)
                  if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith("device.type")
                  and any(isinstance(c, ast.Constant) and c.value in ("cuda", "mps")
                          for c in node.comparators)]  # fmt: skip
    assert not found


def test_memory_is_that_of_the_machine_and_of_this_process() -> None:
    assert 0 < device.free_memory(CPU) <= psutil.virtual_memory().total
    before = device.peak_memory(CPU)
    held = torch.ones(2**25)  # 128 MiB
    assert device.peak_memory(CPU) >= max(before, held.nbytes)
    assert before >= psutil.Process().memory_info().rss / 2


def test_a_clock_that_waits_for_the_device() -> None:
    start = device.synchronised_time(CPU)
    time.sleep(0.01)
    assert device.synchronised_time(CPU) - start >= 0.01
    assert device.bandwidth(CPU, 2**22) > 1e6


def test_a_seed_holds_inside_only() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with device.seeded(7, CPU):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)


def test_float64_is_computed_on_the_cpu_for_an_apple_gpu() -> None:
    assert device.float64_place(torch.device("mps")) == CPU
    assert device.float64_place(torch.device("cuda:1")) == torch.device("cuda:1")
    assert device.to_float64(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


def test_the_allocator_is_set_either_way() -> None:
    """Without a crash, and without an effect on values."""
    for setting in (device.keep_freed_memory, device.release_freed_memory):
        setting()
        assert float(torch.ones(2**20).sum()) == 2**20


@pytest.mark.parametrize(("name", "size"), [("F32", 4), ("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1)])
def test_sizes_of_dtypes(name: str, size: int) -> None:
    assert device.dtype_bytes(name) == size
