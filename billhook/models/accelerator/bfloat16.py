"""Computing in bfloat16 on CPUs that multiply such numbers faster than float32: for estimates, and for training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from billhook.models.device import free_memory
from billhook.models.load import Teacher, undisturbed
from billhook.models.surgery import replace_parameters, shared_copy

CAPABILITIES = ("avx512_bf16", "amx_bf16")  # of a CPU: products of bfloat16 with sums in float32
LEAST_WIDTH = 256  # hidden size below which calls cost more than products
SHARE_OF_ROOM = 4  # the copy takes at most one of so many parts of the memory for activations


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 (measured: 2.3 times as fast as float32)."""
    read: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # an older torch has none
    return any(map(read().get, CAPABILITIES))


def gains_by_bfloat16(teacher: Teacher) -> bool:
    """Return whether a teacher that computes in float32 is faster in bfloat16, where it is."""
    wide = teacher.model.dtype == torch.float32 and teacher.model.config.hidden_size >= LEAST_WIDTH
    return wide and teacher.device.type == "cpu" and multiplies_bfloat16()


def bfloat16_copy(teacher: Teacher, memory: int | None, processes: int = 1) -> Teacher | None:
    """Return a copy of a teacher in memory whose weights are bfloat16; None where that gains nothing or has no room.

    `memory`: bytes for weights and activations together; None is what the machine has free for as many `processes`,
    each with a copy.
    """
    weight_bytes = teacher.weight_bytes
    room = free_memory(teacher.device) // processes if memory is None else memory - weight_bytes
    if teacher.weights is not None or not gains_by_bfloat16(teacher) or SHARE_OF_ROOM * weight_bytes // 2 > room:
        return None
    return in_bfloat16(teacher)


@undisturbed
def in_bfloat16(teacher: Teacher) -> Teacher:
    """Return a copy of a teacher in memory whose weights are bfloat16."""
    model = shared_copy(teacher.model)
    wide = [each for each in model.parameters() if each.dtype == torch.float32]
    replace_parameters(model, {each: nn.Parameter(each.detach().bfloat16(), requires_grad=False) for each in wide})
    return replace(teacher, model=model, lock=threading.RLock())


@contextmanager
def computing_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model, inside the context, compute its passes in `dtype`; on a CPU its head in the dtype of its weights.

    A logit in bfloat16 is rounded to one of 256 steps between two powers of 2.
    """
    if dtype == torch.float32:
        yield
        return
    head = model.get_output_embeddings()

    def in_own_dtype(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits: torch.Tensor = type(head).forward(head, x.to(head.weight.dtype))
        return logits

    if head.weight.device.type == "cpu":
        head.forward = in_own_dtype
    try:
        with torch.autocast(head.weight.device.type, dtype):
            yield
    finally:
        vars(head).pop("forward", None)
