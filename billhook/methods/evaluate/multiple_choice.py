"""Multiple-choice tasks: how often the likeliest choice is the right one, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from billhook.core.errors import ModelError, UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.results.measured import EvalResult
from billhook.data.prefixes import Readout, batch_groups, group_by_prefix, keep_worthwhile, unique_inputs
from billhook.data.token_sets import Choices, TokenSet
from billhook.methods.evaluate import evaluation, vocabulary_size
from billhook.models.transformers_internals import REPEATABLE_LAYERS, new_cache

CHOICE_BATCH_POSITIONS = 512  # of one batch, cached and padded ones too; larger ones only cost memory traffic on a CPU
CHOICE_LOGITS_BYTES = 2**26  # of one batch, in float32


@evaluation
def acc(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Accuracy on multiple-choice items: 1 where the choice with the highest log-probability is the right one.

    Zero-shot; requests are those of `data.choice_tasks`. Where `acc_norm` is wanted too, or many plans: `score_choices`.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc`.
    """
    return score_choices(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc"]


@evaluation
def acc_norm(model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = "") -> EvalResult:
    """Accuracy on multiple-choice items, with log-probabilities divided by the characters of each choice.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc_norm`.
    """
    return score_choices(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc_norm"]


def score_choices(tokens: TokenSet, row_sums: Sequence[float]) -> dict[str, EvalResult]:
    """`acc` and `acc_norm`, 1 or 0 an item, from the log-probability of every row's choice.

    `row_sums`: of one model, by `log_probabilities`, or of one plan, by `Probe.row_sums`. Of equal choices the first is
    the answer. Raises ModelError if one is NaN or infinite.
    """
    choices = _choices(tokens)
    if not all(map(math.isfinite, row_sums)):
        raise ModelError(f"The model's log-probabilities are NaN or infinite. Try {option('dtype', 'float32')}.")
    rows: list[list[int]] = [[] for _ in choices.gold]
    for row, document in enumerate(tokens.documents):
        rows[document].append(row)
    per_character = [value / count for value, count in zip(row_sums, choices.characters, strict=True)]
    told = {}
    for name, values in (("acc", row_sums), ("acc_norm", per_character)):
        answers = [max(range(len(of)), key=lambda i, of=of, v=values: v[of[i]]) for of in rows]  # type: ignore[misc]
        right = tuple(float(answer == gold) for answer, gold in zip(answers, choices.gold, strict=True))
        told[name] = EvalResult(name, tokens.hash, right, (1,) * len(right), tokens.clusters)
    return told


@torch.inference_mode()
def log_probabilities(
    model: Any, tokens: TokenSet, *, watch: EventListener = ignore_events, who: str = ""
) -> list[float]:
    """Log-probability in nats of the choice in every row, given what stands before it.

    Beginnings that rows share are computed once, where the model's cache allows it, and the head only where it is read:
    up to rounding the sums of one forward pass a row.
    """
    _choices(tokens)
    words = vocabulary_size(model)
    sums, done = [0.0] * len(tokens.lengths), 0
    found = keep_worthwhile(group_by_prefix(unique_inputs(tokens), _longest_shared(model)))
    for batch in batch_groups(found, CHOICE_BATCH_POSITIONS, max(1, CHOICE_LOGITS_BYTES // (4 * words))):
        shared = batch[0].shared
        if shared:
            cache = new_cache(model)
            ids = [family.inputs[0].ids[:shared] for family in batch]
            reads = [[r for path in family.inputs for r in path.readouts if r[0] < shared] for family in batch]
            _read(model, ids, reads, sums, cache)
        rest = [(i, path) for i, f in enumerate(batch) for path in f.inputs if len(path.ids) > shared]
        if shared and rest:
            cache.batch_select_indices(torch.tensor([i for i, _ in rest], device=model.device))
        if rest:
            ids = [path.ids[shared:] for _, path in rest]
            reads = [[(at - shared, word, row) for at, word, row in path.readouts if at >= shared] for _, path in rest]
            _read(model, ids, reads, sums, cache if shared else None)
        done += sum(tokens.lengths[row] for row in {r[2] for f in batch for path in f.inputs for r in path.readouts})
        watch(Event("evaluate", done, tokens.tokens, {"of": who}))
    return sums


def _read(
    model: Any, lines: list[tuple[int, ...]], reads: list[list[Readout]], sums: list[float], cache: Any | None
) -> None:
    """One forward pass over lines, padded on the right, behind what `cache` holds, which it extends.

    `reads`: of every line (position, next token, row); each adds its log-probability to its row's sum.
    """
    ids = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.int64, device=model.device)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (line, of) in enumerate(zip(lines, reads, strict=True)):
        ids[i, : len(line)] = torch.tensor(line)
        wanted[i, [at for at, _, _ in of]] = True
    logits = model(
        input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=wanted
    ).logits  # [read, vocabulary]: of the positions that are wanted, line by line
    numbers = wanted.flatten().cumsum(0).view_as(ids) - 1
    every = [(i, *read) for i, of in enumerate(reads) for read in of]
    if every:
        line, position, word = torch.tensor([read[:3] for read in every], device=ids.device).T
        at, logits = numbers[line, position], logits.float()
        values = logits[at, word] - logits.logsumexp(-1)[at]
        for (*_, row), value in zip(every, values.tolist(), strict=True):
            sums[row] += value


@torch.inference_mode()
def _longest_shared(model: Any) -> int | None:
    """The longest row whose beginning the model's KV cache can hold and repeat: 0: none, None: any.

    None of it behind a sliding window, where tokens are dropped, nor by a cache of another kind, nor where a layer of
    the cache has no attention that fills it (a teacher with masked sites).
    """
    cache = new_cache(model)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    if any(type(layer) not in REPEATABLE_LAYERS or layer.get_seq_length() != 1 for layer in cache.layers):
        return 0
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=None)


def _choices(tokens: TokenSet) -> Choices:
    """What makes rows choices. Raises UsageError for text."""
    if tokens.choices is None:
        raise UsageError(
            f"{tokens.source} is text, and accuracy needs multiple-choice items. Give the tokens of a task file, by "
            "billhook.data.choice_tasks.task_tokens."
        )
    return tokens.choices
