"""Byte-pair encoding: what every token is merged from.

A text in whose tokens none is missing keeps them: every merge on the way to a kept token is kept, in its old order, so
that the merge that comes first among all comes first among those that are left.
"""

from __future__ import annotations

from itertools import pairwise

from billhook.core.results.json_form import JsonObject

Pair = tuple[str, str]


def pairs(model: JsonObject) -> list[Pair]:
    """Return the merges of a BPE model in their order, however its file spells them."""
    return [(each[0], each[1]) for each in (m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"])]


def parts_and_needs(model: JsonObject) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Return what stands in the place of every removable token, and the two tokens that each is merged from.

    A token that merges make falls back to the two of its last merge, a character to its bytes. Bytes are not removable,
    nor characters that have no bytes in the vocabulary.
    """
    vocabulary: dict[str, int] = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(pairs(model))}
    fallback = bool(model.get("byte_fallback"))
    parts: dict[int, tuple[int, ...]] = {}
    needs: dict[int, tuple[int, ...]] = {}
    for text, index in vocabulary.items():
        symbols = [text] if len(text) == 1 else _symbols(text, vocabulary, fallback)
        if fallback and is_byte(text):
            continue
        if len(text) == 1:
            left = byte_tokens(text) if fallback else ()
        else:
            merged, last = merge(symbols, ranks)
            left = last if merged == [text] else tuple(merged)
            if merged == [text]:
                needs[index] = tuple(vocabulary[part] for part in last)
        if left and all(part in vocabulary for part in left):
            parts[index] = tuple(vocabulary[part] for part in left)
    return parts, needs


def merge(symbols: list[str], ranks: dict[Pair, int]) -> tuple[list[str], tuple[str, ...]]:
    """Merge the symbols of a word: the pair of the lowest rank first, the leftmost of equal ones. Returns what is left,
    and the pair of the last merge."""
    symbols = list(symbols)
    last: tuple[str, ...] = ()
    while len(symbols) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not found:
            break
        at = min(found)[1]
        last = symbols[at], symbols[at + 1]
        symbols[at : at + 2] = ["".join(last)]
    return symbols, last


def _symbols(text: str, vocabulary: dict[str, int], fallback: bool) -> list[str]:
    """What merging begins with: characters, or the bytes of those that are not in the vocabulary."""
    found: list[str] = []
    for character in text:
        found += byte_tokens(character) if fallback and character not in vocabulary else [character]
    return found


def byte_tokens(text: str) -> tuple[str, ...]:
    """Return the byte tokens of a text: `<0xC3>`, `<0xA9>` of é."""
    return tuple(f"<0x{byte:02X}>" for byte in text.encode())


def is_byte(text: str) -> bool:
    """Return whether a token is a byte of the fallback."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
