"""The machine that Billhook runs on, in numbers: ten seconds of measuring."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.outlook.machines import HERE, Machine
from billhook.methods.evaluate.speed import time_steps
from billhook.models.device import bandwidth, pick_device, synchronised_time, total_memory

SIDE = {"cpu": 1024, "mps": 4096, "cuda": 8192}  # of the square matrices that are multiplied
REPEATS = 5
BLOCKS, STEPS = 16, 8  # of a model so small that its steps are calls and nothing else


def measure_machine(device: str = "auto", watch: EventListener = ignore_events) -> Machine:
    """Return memory, bandwidth, FLOP/s and the time of a call on a device, each the median of several measurements.

    Bandwidth is that of a matrix-vector product; FLOP/s are those of a product of square matrices, in bfloat16 on a GPU
    and in float32 on a CPU, as Billhook computes there. `call_seconds`: a decoding step of a model of width 8, over its
    sites. Power is not measured.
    """
    place = pick_device(device)
    watch(Event("machine", 0, 3))
    reads = bandwidth(place)
    watch(Event("machine", 1, 3))
    computes = matrix_flops(place)
    watch(Event("machine", 2, 3))
    calls = call_seconds(place)
    watch(Event("machine", 3, 3))
    memory = total_memory(place)
    return Machine(HERE, memory, reads, computes, None, "measured here", calls)


@torch.inference_mode()
def matrix_flops(place: torch.device) -> float:
    """Return FLOP/s of a product of square matrices: the median of 5."""
    side = SIDE[place.type]
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    a = torch.ones(side, side, device=place, dtype=dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        start = synchronised_time(place)
        a @ a
        seconds.append(synchronised_time(place) - start)
    return float(2 * side**3 / statistics.median(seconds[1:]))


@torch.inference_mode()
def call_seconds(place: torch.device) -> float:
    """Return the seconds of a site in a decoding step whatever its size: of a model of width 8, the median of 5."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=BLOCKS, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config).to(place).eval()
    ids = torch.zeros(1, 8, dtype=torch.int64, device=place)
    seconds = [time_steps(model, ids, STEPS)[1] for _ in range(REPEATS + 1)]
    return statistics.median(seconds[1:]) / STEPS / (2 * BLOCKS)
