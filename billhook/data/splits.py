"""Splits and joins of token sets: by document, into chunks, halves, training and validation."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.core.errors import DataError, UsageError, option
from billhook.data.token_sets import Choices, TokenSet, token_set


def select_documents(tokens: TokenSet, documents: Sequence[int]) -> TokenSet:
    """Return these documents of a token set, in their order."""
    number = {document: i for i, document in enumerate(sorted(documents))}
    rows = [r for r, document in enumerate(tokens.documents) if document in number]
    choices = tokens.choices
    if choices is not None:
        first, characters = (tuple(of_rows[r] for r in rows) for of_rows in (choices.first, choices.characters))
        choices = Choices(
            first, characters, *(tuple(of[d] for d in number if of) for of in (choices.gold, choices.numbers))
        )
    ids = [tuple(tokens.rows[r, : tokens.lengths[r]].tolist()) for r in rows]
    new_documents = [number[tokens.documents[r]] for r in rows]
    clusters, digests = [tokens.clusters[d] for d in number], [tokens.digests[d] for d in number]
    return token_set(ids, new_documents, clusters, digests, tokens.source, choices=choices)


def without_documents(tokens: TokenSet, *others: TokenSet) -> TokenSet | None:
    """Return the documents of a token set that are in none of the others; None where there are none."""
    gone = {digest for other in others for digest in other.digests}
    left = [document for document, digest in enumerate(tokens.digests) if digest not in gone]
    return select_documents(tokens, left) if left else None


def chunks(tokens: TokenSet, count: int) -> list[TokenSet]:
    """Split a token set into chunks of `count` documents, in order; the last may have fewer."""
    whole = len(tokens.clusters)
    if whole <= count:
        return [tokens]
    return [select_documents(tokens, range(start, min(start + count, whole))) for start in range(0, whole, count)]


def split_every_nth(tokens: TokenSet, count: int) -> tuple[list[int], list[int]]:
    """Return the documents of all texts except every `count`-th, and those of every `count`-th text.

    A single text is split by documents instead. With fewer than `count` texts the second list has the last one; the
    first list is empty if there is nothing to split.
    """
    texts = {text: rank for rank, text in enumerate(dict.fromkeys(tokens.clusters))}
    ranks = [texts[text] if len(texts) > 1 else d for d, text in enumerate(tokens.clusters)]
    count = min(count, max(ranks) + 1)
    chosen = [d for d, rank in enumerate(ranks) if rank % count == count - 1]
    return [d for d in range(len(ranks)) if d not in set(chosen)], chosen


def halves(tokens: TokenSet) -> tuple[TokenSet, TokenSet]:
    """Split a token set into every second text and the others; a single text by documents.

    Raises UsageError if there is nothing to halve.
    """
    split = split_every_nth(tokens, 2)
    if not all(split):
        raise UsageError(
            f"Held-out text of one document cannot be halved. Give more text, or more {option('eval_tokens')}."
        )
    return select_documents(tokens, split[0]), select_documents(tokens, split[1])


def train_validation_split(tokens: TokenSet, count: int) -> tuple[TokenSet, TokenSet]:
    """Split a token set into training tokens and every `count`-th text for validation; a single text by documents.

    Raises DataError if there is nothing to split.
    """
    train, validation = split_every_nth(tokens, count)
    if not train:
        raise DataError(
            f"{tokens.source} holds one document, and a recovery needs a second one to validate on. Give more text."
        )
    return select_documents(tokens, train), select_documents(tokens, validation)


def disjoint_parts(tokens: TokenSet, size: int, count: int) -> list[TokenSet]:
    """Return `count` parts of at least `size` tokens each that share no document, in order.

    Raises DataError for too few tokens.
    """
    lengths = [0] * len(tokens.clusters)
    for document, length in zip(tokens.documents, tokens.lengths, strict=True):
        lengths[document] += length
    parts: list[list[int]] = [[]]
    filled = 0
    for document, length in enumerate(lengths):
        if filled >= size:
            parts.append([])
            filled = 0
        parts[-1].append(document)
        filled += length
    whole = parts if filled >= size else parts[:-1]
    if len(whole) < count:
        raise DataError(
            f"{tokens.source} gives {len(whole)} parts of {size:,} tokens that share no document, and {count} are "
            "wanted. Give more text, or ask for fewer or smaller parts."
        )
    return [select_documents(tokens, documents) for documents in whole[:count]]


def interleave(sets: Sequence[TokenSet], source: str) -> TokenSet:
    """Join token sets of text by taking documents in turn; texts of different sets remain different texts,
    copies aside."""
    order = sorted((d, s) for s, tokens in enumerate(sets) for d in range(len(tokens.clusters)))
    texts: dict[tuple[int, int], int] = {}
    digests = [sets[s].digests[d] for d, s in order]
    merged = _merge_copies([(s, sets[s].clusters[d]) for d, s in order], digests)
    for text in merged:
        texts.setdefault(text, len(texts))
    number = {place: i for i, place in enumerate(order)}
    rows = sorted((number[d, s], r, s) for s, tokens in enumerate(sets) for r, d in enumerate(tokens.documents))
    ids = [tuple(sets[s].rows[r, : sets[s].lengths[r]].tolist()) for _, r, s in rows]
    return token_set(ids, [document for document, _, _ in rows], [texts[text] for text in merged], digests, source)


def _merge_copies(texts: Sequence[tuple[int, int]], digests: Sequence[str]) -> list[tuple[int, int]]:
    """The text of every document, where texts that share a document are the first one of them."""
    first: dict[str, tuple[int, int]] = {}
    same: dict[tuple[int, int], tuple[int, int]] = {}
    for text, digest in zip(texts, digests, strict=True):
        earlier = first.setdefault(digest, text)
        same.setdefault(text, same.get(earlier, earlier))
    return [same[text] for text in texts]
