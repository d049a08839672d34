"""Facts of devices and dtypes: what this machine has, what a value takes, where a number was measured."""

from __future__ import annotations

import os
import platform
import re

import psutil
import torch
import transformers

import billhook
from billhook.core.errors import UsageError
from billhook.core.results.measured import Environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARE_OF_WEIGHTS = 0.75  # of a memory budget, above which a model is streamed: the rest is for activations


# -- loading --------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then an Apple GPU, then the CPU. Raises UsageError for a device that is not there."""
    mps = torch.backends.mps.is_available()
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if mps else [])]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name not in have and not (name == "cuda" and torch.cuda.is_available()):
        raise UsageError(f"This machine has no device {name!r}. It has: {', '.join(have)}. Or write auto.")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The compute dtype: as asked, or float32 on a CPU and the stored one elsewhere. Raises UsageError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if name not in DTYPES:
        raise UsageError(f"There is no dtype {name!r}. Allowed: auto, {', '.join(DTYPES)}.")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError("This GPU has no bfloat16. Use --dtype float16 or float32.")
    return DTYPES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that `device` has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def environment(device: str) -> Environment:
    """Where numbers of this process are measured."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
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
