"""Held-out text by a model and by the same one with fewer tokens: how many it needs, and its bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from billhook.core.errors import ModelError
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.results.exports import VocabularyText
from billhook.core.results.measured import EvalResult
from billhook.core.statistics import mean_interval, paired_difference
from billhook.data.calibration import row_length
from billhook.data.token_sets import TokenSet, special_prefix, token_set
from billhook.methods.evaluate.perplexity import measure_perplexity
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR


@dataclass(frozen=True, slots=True)
class Passages:
    """Passages of one held-out text. `texts[i]` names the text that passage i comes from, counted from 0."""

    source: str
    passages: tuple[str, ...]
    texts: tuple[int, ...]


def passages_of(tokens: TokenSet, tokenizer: Any) -> Passages:
    """Return the rows of a token set as text, without special tokens and halves of characters at their ends."""
    rows = [tokens.rows[r, :n].tolist() for r, n in enumerate(tokens.lengths)]
    texts = [text.strip("\ufffd") for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    held = [(text, tokens.clusters[d]) for text, d in zip(texts, tokens.documents, strict=True) if text]
    return Passages(tokens.source, tuple(text for text, _ in held), tuple(of for _, of in held))


def compare_on(
    held_out: Passages, teacher: Teacher, student: Teacher, *, seed: int = 0, watch: EventListener = ignore_events
) -> VocabularyText:
    """Compare two models on the same passages, each with its own tokens.

    A passage stands behind what the tokenizer puts first, or behind a BOS or EOS token, so that all of its bytes are
    predicted. One with more tokens than a model has positions is read in parts, the same for both.
    """
    held_out, sets = tokens_of(held_out, teacher, student)
    nats = [_nats(each, tokens, watch) for each, tokens in zip((teacher, student), sets, strict=True)]
    return text_change(held_out, (teacher, student), (sets[0], sets[1]), (nats[0], nats[1]), seed)


def tokens_of(held_out: Passages, *models: Teacher) -> tuple[Passages, list[TokenSet]]:
    """Return passages that all models have positions for, and the tokens of each model: a row and a document each."""
    held_out = _fitting(held_out, *models)
    return held_out, [_tokens(held_out, each) for each in models]


def text_change(
    held_out: Passages,
    models: tuple[Teacher, Teacher],
    tokens: tuple[TokenSet, TokenSet],
    nats: tuple[EvalResult, EvalResult],
    seed: int = 0,
) -> VocabularyText:
    """Return how a text changes from one model to the other, from the `nats` of the `tokens` of each.

    `held_out`, `tokens`: as `tokens_of` returns them for the models.
    """
    first = [len(tokens_before(each.tokenizer)) for each in models]
    before, after = ([length - n for length in each.lengths] for each, n in zip(tokens, first, strict=True))
    size = tuple(len(text.encode()) for text in held_out.passages)
    by_byte = [EvalResult("perplexity", held_out.source, each.sums, size, held_out.texts) for each in nats]
    added = tuple(float(b - a) for a, b in zip(before, after, strict=True))
    more = EvalResult("perplexity", held_out.source, added, tuple(before), held_out.texts)
    old, new = (mean_interval(each, seed).mapped(_bits) for each in by_byte)
    change = paired_difference(by_byte[0], by_byte[1], seed).mapped(_bits)
    return VocabularyText(
        held_out.source, sum(size), sum(before), sum(after), mean_interval(more, seed), old, new, change
    )  # fmt: skip


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _nats(teacher: Teacher, tokens: TokenSet, watch: EventListener) -> EvalResult:
    return next(measure_perplexity(teacher, [(Plan(), NO_REPAIR)], tokens, watch=watch))


def _tokens(held_out: Passages, teacher: Teacher) -> TokenSet:
    """Return the passages as rows of tokens."""
    first = tokens_before(teacher.tokenizer)
    rows = [(*first, *ids) for ids in _encode(held_out.passages, teacher.tokenizer)]
    numbers = range(len(rows))
    return token_set(rows, numbers, held_out.texts, ["" for _ in rows], held_out.source)


def _fitting(held_out: Passages, *models: Teacher) -> Passages:
    """Return the passages, in halves where the tokens of one are more than the positions of a model."""
    long: set[int] = set()
    for each in models:
        first = len(tokens_before(each.tokenizer))
        lengths = [first + len(ids) for ids in _encode(held_out.passages, each.tokenizer)]
        long |= {i for i, length in enumerate(lengths) if length > row_length(length, each.model.config)}
    if not long:
        return held_out
    parts: list[tuple[str, int]] = []
    for i, (text, of) in enumerate(zip(held_out.passages, held_out.texts, strict=True)):
        half = len(text) // 2 if i in long else len(text)
        parts += [(part, of) for part in (text[:half], text[half:]) if part]
    found = Passages(held_out.source, tuple(text for text, _ in parts), tuple(of for _, of in parts))
    return _fitting(found, *models)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


def tokens_before(tokenizer: Any) -> list[int]:
    """Return the tokens that a passage stands behind: without any, nothing would predict its first token.

    Raises ModelError for a tokenizer that puts nothing before a text and has neither a BOS nor an EOS token.
    """
    own = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = special_prefix(tokenizer) or [index for index in own if index is not None][:1]
    if not found:
        raise ModelError(
            "The tokenizer has neither a BOS nor an EOS token to read a passage behind. Name one in "
            "tokenizer_config.json, as eos_token."
        )
    return found
