"""The roofline against measured decoding on this machine, and why they differ: everything in turn, again and again.

python benchmarks/roofline.py [MODEL] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

import billhook
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import Workload, resources
from billhook.methods.evaluate.machine import call_seconds, matrix_flops
from billhook.methods.evaluate.speed import time_steps
from billhook.models.device import bandwidth

PROMPT, STEPS = 128, 12


@torch.inference_mode()
def own_bandwidth(model: torch.nn.Module) -> float:
    """Bytes per second at which a vector goes through the model's own matrices, one after the other."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.zeros(1, 1, layer.in_features, dtype=layer.weight.dtype) for layer in layers]
    start = time.perf_counter()
    for layer, x in zip(layers, inputs, strict=True):
        torch.nn.functional.linear(x, layer.weight)
    seconds = time.perf_counter() - start
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) / seconds


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model", nargs="?", default="demo")
    words.add_argument("--rounds", type=int, default=7)
    given = words.parse_args()
    teacher = billhook.load(given.model, device="cpu")
    model, place = teacher.model, teacher.model.device
    ids = torch.zeros(1, PROMPT, dtype=torch.int64)
    time_steps(model, ids, 2)
    own_bandwidth(model)
    ratios: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        wide, own, calls, flops = (
            bandwidth(place, 2**27),
            own_bandwidth(model),
            call_seconds(place),
            matrix_flops(place),
        )
        prompt, decode = time_steps(model, ids, STEPS)
        plain = Machine("here", 10**12, wide, flops, None, "measured here")
        work = Workload(PROMPT + STEPS // 2, 1, PROMPT, float(next(model.parameters()).element_size()))
        for name, machine in (
            ("wide matrix", plain), ("wide matrix, and calls", replace(plain, call_seconds=calls)),
            ("own matrices, and calls", replace(plain, bandwidth=own, call_seconds=calls)),
        ):  # fmt: skip
            told = resources(teacher.anatomy, machine, work)
            ratios.setdefault(f"decode by {name}", []).append(told.decode_seconds / (decode / STEPS))
            ratios.setdefault(f"prefill by {name}", []).append(told.prefill_seconds / prompt)
        print(
            f"wide {wide / 1e9:.2f} GB/s, own {own / 1e9:.2f} GB/s, a call {1e6 * calls:.0f} µs, a step "
            f"{1e3 * decode / STEPS:.1f} ms"
        )
    for name, values in ratios.items():
        print(
            f"{name:36} predicted over measured {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
        )


if __name__ == "__main__":
    main()
