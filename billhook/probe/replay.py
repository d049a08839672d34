"""Start a forward pass in the middle: blocks whose outputs are known give them back without computing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replayed(blocks: nn.ModuleList, known: Any, count: int) -> Iterator[None]:
    """Inside, the first `count` blocks return `known`, the output of the last of them, and compute nothing."""
    first = list(blocks)[:count]
    for block in first:
        block.forward = lambda *args, **kwargs: known
    try:
        yield
    finally:
        for block in first:
            del block.forward


@contextmanager
def recorded(blocks: nn.ModuleList) -> Iterator[list[Any]]:
    """Inside, collects the output of every block of one forward pass, in order."""
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
