"""Splits of token sets: by item, into halves, for training and validation."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.core.errors import DataError, UsageError, option
from billhook.data.token_sets import Choices, TokenSet, token_set


def select_documents(tokens: TokenSet, documents: Sequence[int]) -> TokenSet:
    """Some documents of a token set, in their order."""
    number = {document: i for i, document in enumerate(sorted(documents))}
    rows = [r for r, document in enumerate(tokens.documents) if document in number]
    of = tokens.choices
    if of is not None:
        of = Choices(
            tuple(of.first[r] for r in rows), tuple(of.characters[r] for r in rows), tuple(of.gold[d] for d in number)
        )
    return token_set(
        [tuple(tokens.rows[r, : tokens.lengths[r]].tolist()) for r in rows],
        [number[tokens.documents[r]] for r in rows],
        [tokens.clusters[d] for d in number],
        [tokens.digests[d] for d in number],
        tokens.source,
        choices=of,
    )


def chunks(tokens: TokenSet, count: int) -> list[TokenSet]:
    """A token set in portions of `count` documents, in order; the last one may have fewer."""
    whole = len(tokens.clusters)
    if whole <= count:
        return [tokens]
    return [select_documents(tokens, range(start, min(start + count, whole))) for start in range(0, whole, count)]


def split_every_nth(tokens: TokenSet, count: int) -> tuple[list[int], list[int]]:
    """The documents of all texts but every `count`-th, and of those; where there is one text only, documents count.

    With fewer than `count` of them every last one; the first list is empty where there is nothing to share.
    """
    texts = {text: rank for rank, text in enumerate(dict.fromkeys(tokens.clusters))}
    ranks = [texts[text] if len(texts) > 1 else d for d, text in enumerate(tokens.clusters)]
    count = min(count, max(ranks) + 1)
    chosen = [d for d, rank in enumerate(ranks) if rank % count == count - 1]
    return [d for d in range(len(ranks)) if d not in set(chosen)], chosen


def halves(tokens: TokenSet) -> tuple[TokenSet, TokenSet]:
    """Every second text of a token set, and the others; every second document, where it has one text only.

    Raises UsageError if there is nothing to halve.
    """
    sides = split_every_nth(tokens, 2)
    if not all(sides):
        raise UsageError(
            f"Held-out text of one document cannot be halved. Give more text, or more {option('eval_tokens')}."
        )
    return select_documents(tokens, sides[0]), select_documents(tokens, sides[1])


def train_validation_split(tokens: TokenSet, count: int) -> tuple[TokenSet, TokenSet]:
    """All texts of a token set but every `count`-th, and those; documents, where there is one text only.

    Raises DataError if there is nothing to share.
    """
    rest, chosen = split_every_nth(tokens, count)
    if not rest:
        raise DataError(f"{tokens.source} holds one document, and a recovery needs a second one to validate on.")
    return select_documents(tokens, rest), select_documents(tokens, chosen)


def disjoint_parts(tokens: TokenSet, size: int, count: int) -> list[TokenSet]:
    """`count` portions of at least `size` tokens each that share no document, in order.

    Raises DataError if the tokens do not suffice.
    """
    lengths = [0] * len(tokens.clusters)
    for document, length in zip(tokens.documents, tokens.lengths, strict=True):
        lengths[document] += length
    portions: list[list[int]] = [[]]
    held = 0
    for document, length in enumerate(lengths):
        if held >= size:
            portions.append([])
            held = 0
        portions[-1].append(document)
        held += length
    whole = portions if held >= size else portions[:-1]
    if len(whole) < count:
        raise DataError(
            f"{tokens.source} gives {len(whole)} portions of {size:,} tokens that share no document, and {count} are "
            "wanted. Give more text, or ask for fewer or smaller ones."
        )
    return [select_documents(tokens, documents) for documents in whole[:count]]


def interleave(sets: Sequence[TokenSet], source: str) -> TokenSet:
    """Several token sets of text as one, in turn; texts of different sets stay different texts."""
    order = sorted(
        (d, s) for s, tokens in enumerate(sets) for d in range(len(tokens.clusters))
    )  # so that any beginning
    texts: dict[tuple[int, int], int] = {}  # of the whole is a mixture too
    for d, s in order:
        texts.setdefault((s, sets[s].clusters[d]), len(texts))
    number = {place: i for i, place in enumerate(order)}
    rows = sorted(
        (number[tokens.documents[r], s], r, s) for s, tokens in enumerate(sets) for r in range(len(tokens.lengths))
    )
    return token_set(
        [tuple(sets[s].rows[r, : sets[s].lengths[r]].tolist()) for _, r, s in rows],
        [document for document, _, _ in rows],
        [texts[s, sets[s].clusters[d]] for d, s in order],
        [sets[s].digests[d] for d, s in order],
        source,
    )
