"""Token sets cut and joined: halves for a choice and its proof, disjoint portions, mixtures of several texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from billhook.data import Choices, TextSpec, TokenSet, generate_calibration, token_set, token_sets
from billhook.errors import BillhookError, DataError, UsageError
from billhook.records import Event, EventListener, ignore_events

SOURCE_SEPARATOR = "+"  # between the sources of a mixture


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
        raise UsageError("Held-out text of one document cannot be halved. Give more text, or more --eval-tokens.")
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


def mixed_sets(
    spec: TextSpec,
    model: Any,
    tokenizer: Any,
    watch: EventListener = ignore_events,
    *,
    generated: list[str] | None = None,
) -> tuple[TokenSet, TokenSet]:
    """As `token_sets`, where `data` may name several sources: `my.jsonl+self`. Each gives as many tokens.

    Where `self` is not among them, the model writes `spec.self_share` of the calibration tokens, if it can, and they
    the others. Without held-out text of its own, each source but `self` gives its share of that too.
    `generated`: what the model wrote for it before (`generate_share`); empty: it cannot.
    """
    sources = _sources(spec.data)
    if generated is None:
        generated = generate_share(spec, model, tokenizer, watch)
    mine = generated_token_count(spec) if generated and "self" not in sources else 0
    if len(sources) == 1 and not mine:
        return token_sets(spec, model, tokenizer, watch, generated=generated)
    texts = [source for source in sources if source != "self"]
    held_apart = spec.eval_data is None and bool(texts)
    least = None if spec.least is None else -(-spec.least // len(sources))
    share = replace(spec, tokens=-(-(spec.tokens - mine) // len(sources)), in_all=spec.tokens, least=least)
    if held_apart:
        share = replace(share, eval_tokens=-(-spec.eval_tokens // len(texts)))
    shares = [replace(share, data=source) for source in sources]
    shares += [replace(spec, data="self", tokens=mine)] if mine else []
    found = [token_sets(each, model, tokenizer, watch, generated=generated) for each in shares]
    source = SOURCE_SEPARATOR.join(each.data for each in shares)
    calibration = interleave([mine for mine, _ in found], source)
    held = [rest for each, (_, rest) in zip(shares, found, strict=True) if not held_apart or each.data != "self"]
    evaluation = interleave(held, SOURCE_SEPARATOR.join(texts)) if len(texts) > 1 and held_apart else held[0]
    if twice := len(set(calibration.digests) & set(evaluation.digests)):
        raise DataError(
            f"{twice} documents of --data {source} are in more than one source, and would be in the proof too. "
            "Name each text once."
        )
    return calibration, evaluation


def generated_token_count(spec: TextSpec) -> int:
    """How many calibration tokens the model itself should write."""
    sources = _sources(spec.data)
    return -(-spec.tokens // len(sources)) if "self" in sources else round(spec.self_share * spec.tokens)


def generate_share(spec: TextSpec, model: Any, tokenizer: Any, watch: EventListener = ignore_events) -> list[str]:
    """The texts that the model writes for its calibration; none, and a word about it, if it cannot and need not."""
    if not (tokens := generated_token_count(spec)) or tokenizer is None:
        return []
    try:
        return generate_calibration(replace(spec, tokens=tokens), model, tokenizer, watch)
    except BillhookError as error:
        if "self" in _sources(spec.data):
            raise
        watch(Event("calibrate", 1, 1, f"on {spec.data} alone: {error}"))
        return []


def external_sources(data: str) -> str:
    """The sources of a mixture that are texts, without what the model writes itself."""
    return SOURCE_SEPARATOR.join(source for source in _sources(data) if source != "self")


def _sources(data: str) -> list[str]:
    sources = [data] if Path(data).exists() else data.split(SOURCE_SEPARATOR)
    if not all(sources):
        raise UsageError(f"--data {data} mixes sources, and one of them is empty. Write my.jsonl+self.")
    return sources
