"""Evaluations: each gives one outcome per item, in a fixed order, so that two models can be paired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from billhook.data import TokenSet
from billhook.records import EvalResult
from billhook.registry import Registry

EVALUATIONS: Registry[Callable[..., EvalResult]] = Registry("evaluation")
evaluation = EVALUATIONS.add
BATCH_LOGITS_BYTES = 2**28  # logits of one batch, in float32


@dataclass(frozen=True)
class Batch:
    """Some rows of a token set: `ids` [rows, time], `targets` [rows, time] (-100: none), and their row numbers."""

    ids: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


def words_of(model: Any) -> int:
    """How many logits its head gives of a token."""
    return int(model.get_output_embeddings().weight.shape[0])


def batches(tokens: TokenSet, vocabulary: int, device: torch.device) -> Iterator[Batch]:
    """The rows of a token set, longest first, as many at a time as keep the logits within bounds."""
    order = sorted(range(len(tokens.lengths)), key=lambda r: (-tokens.lengths[r], r))
    start = 0
    while start < len(order):
        time = tokens.lengths[order[start]]
        count = max(1, BATCH_LOGITS_BYTES // (4 * vocabulary * time))
        rows = tuple(order[start : start + count])
        lengths = tuple(tokens.lengths[r] for r in rows)
        ids = tokens.rows[list(rows), :time].to(device)
        targets = torch.full_like(ids, -100)
        for i, n in enumerate(lengths):
            targets[i, : n - 1] = ids[i, 1:n]
        yield Batch(ids, targets, rows, lengths)
        start += count


from billhook.evaluate import choices, generate, perplexity  # noqa: E402, F401 - importing a method files it under its name
