"""Facts of devices and dtypes: what this machine has, what a value takes, where a number was measured."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import billhook
from billhook.core.devices.names import format_devices, parse_devices
from billhook.core.errors import UsageError, option
from billhook.core.results.measured import Environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_FLOAT64 = {"mps"}  # kinds of devices that lack it
SHARE_OF_FREE = 0.85  # of what a device has free, above which a model is streamed
SHARE_OF_WEIGHTS = 0.75  # of a memory budget, above which a model is streamed: the rest is for activations


# -- processes and files --------------------------------------------------------------------------------------------


def child_environment(*foreign: Path) -> dict[str, str]:
    """The environment of a Python process that shares ours, but for places from which others could give it code.

    Of PYTHONPATH are left out: what is not absolute, the working folder, and what lies in a `foreign` one. With
    `python -P` nothing else leads into them.
    """
    home = Path(__file__).resolve().parents[2]
    barred = [folder.resolve() for folder in foreign]
    given = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    kept = [
        str(path)
        for path in given
        if path.is_absolute()
        and path.resolve() not in (home, Path.cwd().resolve())
        and not any(path.resolve().is_relative_to(folder) for folder in barred)
    ]
    own = [] if home.name in ("site-packages", "dist-packages") else [str(home)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(own + kept), "PYTHONSAFEPATH": "1"}


# -- loading --------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then an Apple GPU, then the CPU. Raises UsageError for one that is not there, or several."""
    if len(parse_devices(name)) > 1:
        one = option("device", parse_devices(name)[0])
        raise UsageError(f"{option('device', name)} names several devices, and this takes one. Type {one}.")
    mps = torch.backends.mps.is_available()
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if mps else [])]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name not in have and not (name == "cuda" and torch.cuda.is_available()):
        raise UsageError(f"This machine has no device {name!r}. It has: {', '.join(have)}. Or write auto.")
    return torch.device(name)


def pick_devices(name: str) -> tuple[torch.device, ...]:
    """The devices of a model: one as `pick_device`, or those that a text such as `cuda:0-1,3` names.

    Raises UsageError for what names none, or one that is not there.
    """
    return tuple(map(pick_device, parse_devices(name)))


def devices_name(devices: Sequence[torch.device]) -> str:
    """What devices are called together: `cuda:0-1,3`."""
    return format_devices([str(device) for device in devices])


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The compute dtype: as asked, or float32 on a CPU and the stored one elsewhere. Raises UsageError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. Allowed: auto, {', '.join(DTYPES)}.")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(f"This GPU has no bfloat16. Use {option('dtype', 'float16')} or float32.")
    return DTYPES[name]


def device_module(device: torch.device) -> Any | None:
    """Return torch's module of a kind of device, such as torch.cuda; None where that counts no memory."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def free_memory(device: torch.device) -> int:
    """Bytes that `device` has free, with those that its allocator caches and nobody uses."""
    module = device_module(device)
    if module is None:
        return int(psutil.virtual_memory().available)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + cached)


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has in all; elsewhere those of the machine."""
    module = device_module(device)
    return int(psutil.virtual_memory().total if module is None else module.mem_get_info(device)[1])


def device_count(device: torch.device) -> int:
    """Return how many devices of this kind torch sees."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def device_uuid(device: torch.device) -> str:
    """Return by which name a driver knows a GPU; empty for other devices, and where an older torch does not say it."""
    about = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return str(getattr(about, "uuid", ""))


def environment(device: str) -> Environment:
    """Where numbers of this process are measured. `device`: one, or several by a name as `cuda:0-1,3`."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        cards = Counter(map(torch.cuda.get_device_name, parse_devices(device)))
        machine = " + ".join(card if count == 1 else f"{count} x {card}" for card, count in cards.items())
    return Environment(
        billhook.__version__,
        platform.python_version(),
        torch.__version__,
        transformers.__version__,
        device,
        machine,
        torch.get_num_threads(),
    )


SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors writes them


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16: what options, configs and reports say."""
    return str(dtype).removeprefix("torch.")


def dtype_bytes(name: str) -> int:
    """Bytes of one element of a dtype as safetensors writes it: 2 for BF16."""
    bits = re.search(r"\d+", name)
    return int(bits[0]) // 8 if bits else 1  # BOOL


# -- computing --------------------------------------------------------------------------------------------------------


def float64_place(device: torch.device) -> torch.device:
    """Return where float64 is computed for tensors on `device`: the CPU for an Apple GPU, which has none."""
    return torch.device("cpu") if device.type in NO_FLOAT64 else device


def to_float64(values: torch.Tensor) -> torch.Tensor:
    """Return the values in float64, on the CPU where the device has none."""
    return values.to(float64_place(values.device)).double()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed` on the CPU and on `device`; afterwards from where it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# -- time and memory --------------------------------------------------------------------------------------------------


def synchronised_time(device: torch.device) -> float:
    """Return seconds of a steady clock, once everything that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    status = Path("/proc/self/status")  # Linux keeps the parent's peak in ru_maxrss across a fork
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resource_use() -> dict[str, float | int]:
    """Return what this process uses: `cpu_seconds` so far, `memory_bytes`, and on a GPU `gpu_memory_bytes`."""
    use: dict[str, float | int] = {
        "cpu_seconds": round(time.process_time(), 3),
        "memory_bytes": psutil.Process().memory_info().rss,
    }
    if torch.cuda.is_initialized():
        use["gpu_memory_bytes"] = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
    return use


@torch.inference_mode()
def bandwidth(device: torch.device, size_bytes: int | None = None) -> float:
    """Return bytes per second at which a matrix-vector product streams a matrix from memory; the median of 5.

    On a GPU 2 GB, or what fits, ten times in a row, so that waiting for the device counts little.
    """
    on_cpu = device.type == "cpu"
    size = size_bytes or (2**28 if on_cpu else min(2**31, free_memory(device) // 4))
    rows, in_a_row = max(1, size // 4 // 4096), 1 if on_cpu else 10
    matrix = torch.ones(rows, 4096, device=device)  # no zeros: memory that compresses would look faster
    vector = torch.ones(4096, device=device)
    seconds = []
    for _ in range(6):
        start = synchronised_time(device)
        for _ in range(in_a_row):
            matrix @ vector
        seconds.append((synchronised_time(device) - start) / in_a_row)
    return matrix.nbytes / statistics.median(seconds[1:])


def keep_freed_memory() -> None:
    """Keep glibc from returning large buffers after every forward pass and faulting them in anew (LOG.md, 1)."""
    _set_allocator(map_above=2**30, trim_above=2**31 - 1)


def release_freed_memory() -> None:
    """Make glibc return what large tensors leave behind: a streamed model frees its weights all the time.

    For the whole process: undoes `keep_freed_memory`, but for buffers of moderate size.
    """
    _set_allocator(map_above=2**26, trim_above=2**27)


def _set_allocator(map_above: int, trim_above: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, map_above)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_above)  # M_TRIM_THRESHOLD


# -- files that one process holds -------------------------------------------------------------------------------------
