"""How much work a device gets at a time: on a CPU what its caches hold, on a GPU what keeps it busy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from billhook.models.device import free_memory

WIDE = 4096  # hidden size of a model of 8 billion parameters, for which the wave of a GPU is stated


@dataclass(frozen=True, slots=True)
class WorkSizes:
    """Amounts of work at a time.

    - `chunk`: tokens that pass a block together.
    - `wave`: tokens times plans to measure together, of a model in memory.
    - `head_tokens`: tokens whose logits of a piece of the vocabulary are computed together.
    - `logits_bytes`: of an evaluation's batch, in float32.
    - `choice_positions`, `choice_logits_bytes`: of a batch of choices, with cached and padded positions.
    - `answer_positions`: of a batch of prompts, with their complete answers.
    - `training_tokens`: of a forward and backward pass.
    - `launches_count`: a call has a cost of its own, so that few large ones are better than many small ones.
    """

    chunk: int
    wave: int
    head_tokens: int
    logits_bytes: int
    choice_positions: int
    choice_logits_bytes: int
    answer_positions: int
    training_tokens: int
    launches_count: bool


# The GPU's row is arithmetic and not measured: a block of 8 billion parameters takes 0.35 ms to launch and computes
# 16,000 tokens in about 13 ms on an H100 (docs/gpu.md).
SIZES = {
    "cpu": WorkSizes(512, 4096, 1024, 2**28, 512, 2**26, 4096, 1024, False),
    "mps": WorkSizes(4096, 8192, 2048, 2**29, 4096, 2**28, 16384, 4096, True),
    "gpu": WorkSizes(16384, 16384, 4096, 2**31, 16384, 2**30, 65536, 8192, True),
}
MOST_WAVE = 65536
SHARE_OF_FREE = 8  # logits of a batch take at most one of so many parts of what is free


def warm_up_runs(device: torch.device) -> int:
    """Return the runs before the first that is timed: libraries and clocks of a GPU want three."""
    return 1 if device.type == "cpu" else 3


def work_sizes(device: torch.device, width: int = WIDE) -> WorkSizes:
    """Return the sizes for a device, and a model of this hidden size; those of logits fit into what it has free."""
    sizes = SIZES.get(device.type, SIZES["gpu"])
    if not sizes.launches_count:
        return sizes
    wave = min(MOST_WAVE, max(sizes.wave, sizes.wave * WIDE**2 // width**2))  # less work a token in a narrower model
    room = max(SIZES["cpu"].choice_logits_bytes, free_memory(device) // SHARE_OF_FREE)
    return replace(
        sizes, wave=wave, logits_bytes=min(sizes.logits_bytes, room),
        choice_logits_bytes=min(sizes.choice_logits_bytes, room),
    )  # fmt: skip
