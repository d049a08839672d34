"""Unigram: what a text has in the place of every piece, by the likeliest segmentation into others.

A text in whose pieces none is missing keeps them: its segmentation was the likeliest of all, and is among those left.
"""

from __future__ import annotations

from math import inf

from billhook.core.results.json_form import JsonObject
from billhook.models.vocabulary.bpe import byte_tokens, is_byte


def parts_and_needs(model: JsonObject) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Return what stands in the place of every removable piece, and nothing that pieces need.

    The unknown piece stays, and the least likely one, from whose score the library derives that of unknown characters;
    so do bytes, and characters that have no bytes in the vocabulary.
    """
    scores: dict[str, float] = {}
    ids: dict[str, int] = {}
    for index, (text, score) in enumerate(model["vocab"]):
        scores[text], ids[text] = score, index
    fallback, unknown = bool(model.get("byte_fallback")), model.get("unk_id")
    least, longest = min(scores, key=scores.__getitem__, default=""), max(map(len, scores), default=0)
    parts: dict[int, tuple[int, ...]] = {}
    for text, index in ids.items():
        if index == unknown or text == least or (fallback and is_byte(text)):
            continue
        left = byte_tokens(text) if len(text) == 1 and fallback else _best(text, scores, longest)
        if left and all(part in ids for part in left):
            parts[index] = tuple(ids[part] for part in left)
    return parts, {}


def _best(text: str, scores: dict[str, float], longest: int) -> tuple[str, ...]:
    """Return the likeliest segmentation of a text into other pieces; empty if there is none."""
    best: list[tuple[float, tuple[str, ...]]] = [(0.0, ()), *(((-inf, ()),) * len(text))]
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - longest), end):
            piece = text[start:end]
            if piece in scores and piece != text and best[start][0] > -inf:
                score = best[start][0] + scores[piece]
                if score > best[end][0]:
                    best[end] = score, (*best[start][1], piece)
    return best[-1][1]
