"""Token sets: texts as rows of tokens, with what they come from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.core.results.measured import TokenSetInfo

DOCUMENT_TOKENS = 1024  # longer texts are split; the text stays the cluster for statistics
PIECE = 1 << 20  # characters that are tokenised at a time, about
CONTEXT = 2048  # characters on each side, from which it is seen whether a text may be cut
MIN_ROW = 8  # a row of fewer tokens tells nothing and costs as much padding as it saves


@dataclass(frozen=True, slots=True)
class Choices:
    """What makes the rows of a token set the choices of items; an item is a document, its rows stand together.

    `first[r]`: where in row r the choice begins, at least 1; `characters[r]`: of its text without the leading blank.
    `gold[d]`: which of the rows of document d is right, counted from 0. `numbers[d]`: its line in the file, from 1.
    """

    first: tuple[int, ...]
    characters: tuple[int, ...]
    gold: tuple[int, ...]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenSet:
    """Rows of tokens, none of which crosses from one document into the next.

    `rows`: [rows, time] int64, padded on the right; `lengths[r]` tokens of row r count. `documents[r]` is the document
    that row r belongs to, counted from 0; `clusters[d]` names the text of document d. `choices`, where rows are choices
    of items. `hash` is of all of these.
    """

    rows: torch.Tensor
    lengths: tuple[int, ...]
    documents: tuple[int, ...]
    clusters: tuple[int, ...]
    source: str
    hash: str
    digests: tuple[str, ...]  # of each document, whole
    choices: Choices | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def info(self) -> TokenSetInfo:
        """What it is made of, without its tokens."""
        items = None if self.choices is None else len(self.choices.gold)
        documents, texts = len(self.clusters), len(set(self.clusters))
        return TokenSetInfo(self.source, self.tokens, len(self.lengths), documents, texts, self.hash, items)


@dataclass(frozen=True, slots=True)
class Document:
    """Up to 1,024 tokens of one text; `text` counts the texts of its source. Copies of a text are one text."""

    text: int
    ids: tuple[int, ...]

    def digest(self) -> str:
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]


def without_layout(text: str) -> str:
    """A text with one blank in place of all whitespace between words: what is equal so is a copy."""
    return " ".join(text.split())


# -- documents ------------------------------------------------------------------------------------------------------


def documents(texts: list[str], tokenizer: Any, seed: int) -> list[Document]:
    """Texts as documents of at most 1,024 tokens, in a seeded order that takes every text once before any twice."""
    return order_documents(encode_texts(texts, tokenizer), seed)


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of every text, without those that the tokenizer puts before one; some at a time, to bound memory."""
    ids: list[list[int]] = []
    batch: list[str] = []
    size = 0
    for text in texts:
        if size + len(text) > PIECE:
            ids += _encoded(batch, tokenizer)
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    return ids + _encoded(batch, tokenizer)


def _encoded(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if len(texts) == 1 and len(texts[0]) > 2 * PIECE:
        return [[i for piece in _pieces(texts[0], tokenizer) for i in _encoded([piece], tokenizer)[0]]]
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def _pieces(text: str, tokenizer: Any) -> Iterator[str]:
    """A long text in pieces that have the tokens of the whole; where none can be cut off so, the rest is one piece."""
    start = 0
    while len(text) - start > 2 * PIECE:
        places = range(start + PIECE, start + PIECE + CONTEXT)
        blanks = [at for at in places if text[at].isspace()][:8]
        end = next((at for at in blanks if _separable(text, at, tokenizer)), None)
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _separable(text: str, at: int, tokenizer: Any) -> bool:
    """Whether the text around a place has the same tokens if it is cut there."""
    left, right = text[at - CONTEXT : at], text[at : at + CONTEXT]
    whole, *parts = (_encoded([piece], tokenizer)[0] for piece in (left + right, left, right))
    return bool(whole == [*parts[0], *parts[1]])


def order_documents(encoded: list[list[int]], seed: int) -> list[Document]:
    """The documents of encoded texts in a seeded order that takes every text once before any twice."""
    order = list(range(len(encoded)))
    random.Random(seed).shuffle(order)
    split = [
        (start // DOCUMENT_TOKENS, rank, Document(text, tuple(encoded[text][start : start + DOCUMENT_TOKENS])))
        for rank, text in enumerate(order)
        for start in range(0, len(encoded[text]), DOCUMENT_TOKENS)
    ]
    return [document for _, _, document in sorted(split, key=lambda entry: entry[:2]) if len(document.ids) >= MIN_ROW]


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord, such as a BOS token, whatever it puts after it."""
    for text in ("a", "0", ".", "the"):
        bare, full = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return list(full[:start])
    return []


def pack_rows(documents: list[Document], tokens: int, length: int, prefix: list[int], source: str) -> TokenSet:
    """Rows of at most `length` tokens until `tokens` are reached: first one row of every document, then a second one.

    Every row begins with `prefix`. Fewer tokens come back if the documents hold no more.
    """
    body = length - len(prefix)
    chosen: list[tuple[int, int, tuple[int, ...]]] = []  # document, start, tokens
    total, start = 0, 0
    while total < tokens and any(len(d.ids) - start >= MIN_ROW for d in documents):
        for index, document in enumerate(documents):
            piece = document.ids[start : start + min(body, max(tokens - total - len(prefix), MIN_ROW))]
            if len(piece) >= MIN_ROW and total < tokens:
                row = piece if list(piece[: len(prefix)]) == prefix else (*prefix, *piece)  # chats begin with BOS
                chosen.append((index, start, row))
                total += len(row)
        start += body
    chosen.sort()
    used = sorted({index for index, _, _ in chosen})
    return token_set(
        [ids for _, _, ids in chosen],
        [used.index(index) for index, _, _ in chosen],
        [documents[index].text for index in used],
        [documents[index].digest() for index in used],
        source,
    )


def truncate(tokens: TokenSet, count: int) -> TokenSet:
    """The first rows of a token set that hold at least `count` tokens, or all of it; of choices, whole items."""
    total, rows = 0, []
    for r, (row, length) in enumerate(zip(tokens.rows, tokens.lengths, strict=True)):
        if total >= count and not (tokens.choices and tokens.documents[r] == tokens.documents[r - 1]):
            break
        rows.append(tuple(row[:length].tolist()))
        total += length
    documents = tokens.documents[: len(rows)]
    kept = max(documents) + 1
    part = tokens.choices
    if part is not None:
        part = Choices(part.first[: len(rows)], part.characters[: len(rows)], part.gold[:kept], part.numbers[:kept])
    return token_set(rows, documents, tokens.clusters[:kept], tokens.digests[:kept], tokens.source, choices=part)


def token_set(
    rows: Sequence[tuple[int, ...]],
    documents: Sequence[int],
    clusters: Sequence[int],
    digests: Sequence[str],
    source: str,
    *,
    choices: Choices | None = None,
) -> TokenSet:
    """Pad and hash."""
    lengths = tuple(map(len, rows))
    padded = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int64)
    for r, ids in enumerate(rows):
        padded[r, : len(ids)] = torch.tensor(ids)
    digest = hashlib.sha256(json.dumps([lengths, list(documents), list(clusters)]).encode())
    digest.update(padded.numpy().tobytes())
    if choices is not None:
        digest.update(json.dumps([choices.first, choices.characters, choices.gold]).encode())
    key = digest.hexdigest()[:16]
    return TokenSet(padded, lengths, tuple(documents), tuple(clusters), source, key, tuple(digests), choices)
