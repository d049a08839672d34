"""Multiple-choice tasks: how often the likeliest choice is right, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from billhook.core.errors import ModelError, UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import EvalResult
from billhook.data.prefixes import Readout, SharingCosts, batch_groups, group_by_prefix, keep_worthwhile, unique_inputs
from billhook.data.token_sets import Choices, TokenSet
from billhook.methods.evaluate import evaluation, vocabulary_size
from billhook.methods.evaluate.served import ServedModel
from billhook.models.accelerator.sizes import work_sizes
from billhook.models.accelerator.spreading import devices_of
from billhook.models.structure import rope_boundary
from billhook.models.transformers_internals import REPEATABLE_LAYERS, logits_at, new_cache


@evaluation
def acc(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Score 1 where the choice with the highest log-probability is right.

    Requests: `data.choice_tasks`. For `acc_norm` too, or several plans, call `score_choices`.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc`.
    """
    return score_choices(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc"]


@evaluation
def acc_norm(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Score 1 where the choice with the highest log-probability per character is right.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc_norm`.
    """
    return score_choices(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc_norm"]


def score_choices(tokens: TokenSet, row_sums: Sequence[float]) -> dict[str, EvalResult]:
    """Score items by `acc` and `acc_norm`, 1 or 0 each, from the log-probability of each row's choice.

    `row_sums`: of one model, by `log_probabilities`, or of one plan, by `Probe.row_sums`. The first of equal choices is
    the answer. Raises ModelError for a NaN or infinite value.
    """
    choices, rows = _choices(tokens), _rows_of_items(tokens, row_sums)
    per_character = [value / count for value, count in zip(row_sums, choices.characters, strict=True)]
    results = {}
    for name, values in (("acc", row_sums), ("acc_norm", per_character)):
        scores = [[values[row] for row in item] for item in rows]
        right = tuple(float(s.index(max(s)) == gold) for s, gold in zip(scores, choices.gold, strict=True))
        results[name] = EvalResult(name, tokens.hash, right, (1,) * len(right), tokens.clusters)
    return results


def right_logprobs(tokens: TokenSet, row_sums: Sequence[float]) -> EvalResult:
    """Score items by the log-probability in nats that the right choice has among the choices of its item.

    It tells more than `acc` where nearly all items are right, or hardly one: guessing among k choices gets -log(k).
    Arguments and errors as for `score_choices`.
    """
    nats = []
    for item, gold in zip(_rows_of_items(tokens, row_sums), _choices(tokens).gold, strict=True):
        values = [row_sums[row] for row in item]
        nats.append(values[gold] - max(values) - math.log(math.fsum(math.exp(x - max(values)) for x in values)))
    return EvalResult("right_logprob", tokens.hash, tuple(nats), (1,) * len(nats), tokens.clusters)


def _rows_of_items(tokens: TokenSet, row_sums: Sequence[float]) -> list[list[int]]:
    """Return the numbers of the rows of each item. Raises ModelError for a NaN or infinite value."""
    if not all(map(math.isfinite, row_sums)):
        raise ModelError(f"The model's log-probabilities are NaN or infinite. Try {option('dtype', 'float32')}.")
    rows: list[list[int]] = [[] for _ in tokens.clusters]
    for row, document in enumerate(tokens.documents):
        rows[document].append(row)
    return rows


@torch.inference_mode()
def log_probabilities(
    model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "",
    sharing: SharingCosts = SharingCosts(),  # noqa: B008 - an immutable value
) -> list[float]:  # fmt: skip
    """Return the log-probability in nats of each row's choice, given its context.

    Shared prefixes are computed once, where the model's cache allows it and `sharing` finds it worthwhile; the head is
    computed only where it is read. The sums equal those of one forward pass per row, up to rounding; a model in a
    runtime makes one.
    """
    _choices(tokens)
    if isinstance(model, ServedModel):
        return model.choice_logprobs(tokens, watch, who)
    sizes = work_sizes(torch.device(model.device))
    most_reads = max(1, sizes.choice_logits_bytes // (4 * vocabulary_size(model)))
    sums, done = [0.0] * len(tokens.lengths), 0
    boundary = rope_boundary(model.config)
    longest = min((n for n in (_longest_shared(model), boundary) if n is not None), default=None)
    groups = keep_worthwhile(group_by_prefix(unique_inputs(tokens), longest, sharing), sharing)
    for batch in batch_groups(groups, sizes.choice_positions, most_reads, boundary):
        shared = batch[0].shared
        inputs = [(i, x) for i, group in enumerate(batch) for x in group.inputs]
        if shared:
            cache = new_cache(model)
            ids = [group.inputs[0].ids[:shared] for group in batch]
            reads = [[r for x in group.inputs for r in x.readouts if r[0] < shared] for group in batch]
            _read(model, ids, reads, sums, cache)
        rest = [(i, x) for i, x in inputs if len(x.ids) > shared]
        if shared and rest:
            where = model.device if len(devices_of(model)) == 1 else "cpu"  # as the cache is on many
            cache.batch_select_indices(torch.tensor([i for i, _ in rest], device=where))
        if rest:
            ids = [x.ids[shared:] for _, x in rest]
            reads = [[(at - shared, word, row) for at, word, row in x.readouts if at >= shared] for _, x in rest]
            _read(model, ids, reads, sums, cache if shared else None)
        done += sum(tokens.lengths[row] for row in {row for _, x in inputs for _, _, row in x.readouts})
        watch(Event("evaluate", done, tokens.tokens, {"of": who}))
    return sums


def _read(
    model: Any, lines: list[tuple[int, ...]], reads: list[list[Readout]], sums: list[float], cache: Any | None
) -> None:
    """Add the log-probabilities of `reads` to the sums of their rows, in one forward pass.

    `lines` are padded on the right and continue the prefixes in `cache`, which the pass extends. `reads`: for each line
    its readouts.
    """
    ids = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.int64)  # copied to the device once
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (line, readouts) in enumerate(zip(lines, reads, strict=True)):
        ids[i, : len(line)] = torch.tensor(line)
        wanted[i, [at for at, _, _ in readouts]] = True
    logits = logits_at(model, ids.to(model.device), wanted.to(model.device), cache).float()
    numbers = wanted.flatten().cumsum(0).view_as(ids) - 1
    flat = [(i, *readout) for i, readouts in enumerate(reads) for readout in readouts]
    if flat:
        line, position, word = torch.tensor([readout[:3] for readout in flat]).T
        at, word = numbers[line, position].to(logits.device), word.to(logits.device)
        values = logits[at, word] - logits.logsumexp(-1)[at]
        for (*_, row), value in zip(flat, values.tolist(), strict=True):
            sums[row] += value


@torch.inference_mode()
def _longest_shared(model: Any) -> int | None:
    """Return the length of the longest input whose prefix the KV cache can repeat; 0: none, None: any.

    A sliding window drops tokens, other kinds of cache cannot be repeated, and a masked site leaves its layer empty.
    """
    cache = new_cache(model)
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    logits_at(model, one, one == 0, cache)
    if any(type(layer) not in REPEATABLE_LAYERS or layer.get_seq_length() != 1 for layer in cache.layers):
        return 0
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=None)


def _choices(tokens: TokenSet) -> Choices:
    """Return the choices of a token set. Raises UsageError for text."""
    if tokens.choices is None:
        raise UsageError(
            f"{tokens.source} is text, and accuracy needs multiple-choice items. Give the tokens of a task file: "
            "billhook.data.choice_tasks.task_tokens(FILE, tokenizer)."
        )
    return tokens.choices
