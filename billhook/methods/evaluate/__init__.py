"""Evaluations: each returns one outcome per item, in a fixed order, so that two models can be paired."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import Registry, resolve_options, wrong_return
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR
from billhook.models.structure import rope_boundary

EVALUATIONS: Registry[Callable[..., EvalResult]] = Registry("evaluation")
evaluation = EVALUATIONS.add


def run_evaluation(
    name: str, model: Any, eval_set: Any, *, watch: EventListener = ignore_events, who: str = "", **options: Any
) -> EvalResult:
    """Evaluate a model by name on a set: text, items of choices, or prompts. Returns one outcome per item.

    `watch` and `who` are passed on where the evaluation takes them. Raises UsageError for an unknown name, and for an
    evaluation with other numbers of counts or texts than of outcomes.
    """
    function = EVALUATIONS[name]
    parameters = inspect.signature(function).parameters
    progress = {key: value for key, value in {"watch": watch, "who": who}.items() if key in parameters}
    result = function(model, eval_set, **progress, **options)
    if not isinstance(result, EvalResult):
        raise wrong_return("evaluation", name, "an EvalResult", result)
    sizes = len(result.sums), len(result.counts), len(result.clusters)
    if not sizes[0] or len(set(sizes)) > 1:
        raise UsageError(
            f"The evaluation {name} gave {sizes[0]} outcomes, {sizes[1]} counts and {sizes[2]} texts. It must give one "
            "of each per item."
        )
    return result


def evaluate_by_name(
    teacher: Teacher, eval_set: Any, names: Sequence[str], options: Mapping[str, Any], *, watch: EventListener, who: str
) -> dict[str, EvalResult]:
    """Evaluate a model on one set by each of `names`, with those of `options` that it takes.

    Raises ResourceError for a streamed model, which only the built-in evaluations support.
    """
    resolved = resolve_options(dict(options), *(EVALUATIONS[name] for name in names))
    if teacher.weights is not None:
        raise ResourceError(
            f"{teacher.name} is larger than the free memory, and {option('evaluations')} needs it in memory. Give more "
            f"{option('memory')}, or leave {option('evaluations')} out."
        )
    pairs = zip(names, resolved, strict=True)
    with teacher.lock:
        return {name: _evaluated(name, teacher, eval_set, watch=watch, who=who, **given) for name, given in pairs}


def _evaluated(name: str, teacher: Teacher, eval_set: Any, **options: Any) -> EvalResult:
    """An evaluation of a teacher; its perplexity is the one that is shown everywhere."""
    if name == "perplexity":
        return next(perplexity.measure_perplexity(teacher, [(Plan(), NO_REPAIR)], eval_set, watch=options["watch"]))
    return run_evaluation(name, teacher.model, eval_set, **options)


@dataclass(frozen=True)
class RowBatch:
    """Rows of a token set: `ids` [rows, time], `targets` [rows, time] (-100: none), row numbers and lengths."""

    ids: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


def vocabulary_size(model: Any) -> int:
    """Return the number of logits per token."""
    return int(model.get_output_embeddings().weight.shape[0])


def batches(tokens: TokenSet, model: Any) -> Iterator[RowBatch]:
    """Yield the rows of a token set, longest first, with as many logits per batch as the device takes.

    Rows that have other rope factors than the longest row are in a batch of their own.
    """
    vocabulary, device, boundary = vocabulary_size(model), model.device, rope_boundary(model.config)
    order = sorted(range(len(tokens.lengths)), key=lambda r: (-tokens.lengths[r], r))
    start, most = 0, work_sizes(device).logits_bytes
    while start < len(order):
        time = tokens.lengths[order[start]]
        count = max(1, most // (4 * vocabulary * time))
        if boundary is not None and time > boundary:
            count = min(count, sum(tokens.lengths[r] > boundary for r in order[start:]))
        rows = tuple(order[start : start + count])
        lengths = tuple(tokens.lengths[r] for r in rows)
        ids = tokens.rows[list(rows), :time]
        targets = torch.full_like(ids, -100)
        for i, n in enumerate(lengths):
            targets[i, : n - 1] = ids[i, 1:n]
        yield RowBatch(ids.to(device), targets.to(device), rows, lengths)
        start += count


from billhook.methods.evaluate import generation, multiple_choice, perplexity  # noqa: E402, F401 - they register
