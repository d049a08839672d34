"""Multiple-choice tasks: how often the likeliest choice is the right one, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from billhook.data import Choices, TokenSet
from billhook.errors import ModelError, UsageError
from billhook.evaluate import batches, evaluation
from billhook.losses import nll
from billhook.records import EvalResult, Event, Watch, silent


@evaluation
def acc(model: Any, tokens: TokenSet, *, watch: Watch = silent, who: str = "") -> EvalResult:
    """Accuracy on multiple-choice items: 1 where the choice with the highest log-probability is the right one.

    Zero-shot; requests are those of `billhook.tasks`. Where `acc_norm` is wanted too, or many plans: `outcomes`.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc`.
    """
    return outcomes(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc"]


@evaluation
def acc_norm(model: Any, tokens: TokenSet, *, watch: Watch = silent, who: str = "") -> EvalResult:
    """Accuracy on multiple-choice items, with log-probabilities divided by the characters of each choice.

    Source: Gao et al., lm-evaluation-harness 0.4, `acc_norm`.
    """
    return outcomes(tokens, log_probabilities(model, tokens, watch=watch, who=who))["acc_norm"]


def outcomes(tokens: TokenSet, row_sums: Sequence[float]) -> dict[str, EvalResult]:
    """`acc` and `acc_norm`, 1 or 0 an item, from the log-probability of every row's choice.

    `row_sums`: of one model, by `log_probabilities`, or of one plan, by `Probe.row_sums`. Of equal choices the first is
    the answer. Raises ModelError if one is NaN or infinite.
    """
    choices = _choices(tokens)
    if not all(map(math.isfinite, row_sums)):
        raise ModelError("The model's log-probabilities are NaN or infinite. Try --dtype float32.")
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
def log_probabilities(model: Any, tokens: TokenSet, *, watch: Watch = silent, who: str = "") -> list[float]:
    """Log-probability in nats of the choice in every row, given what stands before it; one forward pass a row."""
    first = _choices(tokens).first
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    sums = [0.0] * len(tokens.lengths)
    done = 0
    for batch in batches(tokens, vocabulary, model.device):
        logits = model(input_ids=batch.ids, use_cache=False).logits  # [rows, time, vocabulary]
        for i, (row, n) in enumerate(zip(batch.rows, batch.lengths, strict=True)):
            at = slice(first[row] - 1, n - 1)
            sums[row] = -float(nll(logits[i, at], logits[i, at], batch.targets[i, at]).double().sum())
        done += sum(batch.lengths)
        watch(Event("evaluate", done, tokens.tokens, who))
    return sums


def _choices(tokens: TokenSet) -> Choices:
    """What makes rows choices. Raises UsageError for text."""
    if tokens.choices is None:
        raise UsageError(
            f"{tokens.source} is text, and accuracy needs multiple-choice items. Give the tokens of a task file, by "
            "billhook.tasks.task_tokens."
        )
    return tokens.choices
