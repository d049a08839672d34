"""Evaluations: each gives one outcome per item, in a fixed order, so that two models can be paired."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.registry import Registry, resolve_options
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.models.load import Teacher

EVALUATIONS: Registry[Callable[..., EvalResult]] = Registry("evaluation")
evaluation = EVALUATIONS.add
BATCH_LOGITS_BYTES = 2**28  # logits of one batch, in float32


def evaluate(
    name: str, model: Any, eval_set: Any, *, watch: EventListener = ignore_events, who: str = "", **options: Any
) -> EvalResult:
    """What the evaluation of a name says of a model on a set: text, items of choices, or prompts; an outcome an item.

    `watch` and `who` are passed on where the evaluation takes them. Raises UsageError for an unknown name, and for one
    that does not give as many counts and texts as outcomes.
    """
    function = EVALUATIONS[name]
    taken = inspect.signature(function).parameters
    seen = {key: value for key, value in {"watch": watch, "who": who}.items() if key in taken}
    result = function(model, eval_set, **seen, **options)
    sizes = len(result.sums), len(result.counts), len(result.clusters)
    if not sizes[0] or len(set(sizes)) > 1:
        raise UsageError(
            f"The evaluation {name} gave {sizes[0]} outcomes, {sizes[1]} counts and {sizes[2]} texts. It must give one "
            "of each for every item."
        )
    return result


def evaluate_by_name(
    teacher: Teacher, eval_set: Any, names: Sequence[str], options: Mapping[str, Any], *, watch: EventListener, who: str
) -> dict[str, EvalResult]:
    """Each of the named evaluations of a model on one set, with those of `options` that it takes.

    Raises ResourceError for a streamed model, which no evaluation but ours can ask.
    """
    own = resolve_options(dict(options), *(EVALUATIONS[name] for name in names))
    if teacher.weights is not None:
        raise ResourceError(
            f"{teacher.name} is larger than the memory that is free, so evaluations that are named have no model to "
            f"ask. Give more {option('memory')}, or leave {option('evaluations')} out."
        )
    pairs = zip(names, own, strict=True)
    with teacher.lock:
        return {name: evaluate(name, teacher.model, eval_set, watch=watch, who=who, **mine) for name, mine in pairs}


@dataclass(frozen=True)
class RowBatch:
    """Some rows of a token set: `ids` [rows, time], `targets` [rows, time] (-100: none), and their row numbers."""

    ids: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


def vocabulary_size(model: Any) -> int:
    """How many logits its head gives of a token."""
    return int(model.get_output_embeddings().weight.shape[0])


def batches(tokens: TokenSet, vocabulary: int, device: torch.device) -> Iterator[RowBatch]:
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
        yield RowBatch(ids, targets, rows, lengths)
        start += count


from billhook.methods.evaluate import (  # noqa: E402, F401 - they file themselves in the registry above
    generation,
    multiple_choice,
    perplexity,
)
