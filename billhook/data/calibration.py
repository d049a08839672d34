"""Calibration and held-out tokens: each from a text of its own, or from halves of the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from billhook.core.errors import BillhookError, DataError, UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.data.generated import sample_texts
from billhook.data.splits import interleave
from billhook.data.texts import SELF, SOURCE_SEPARATOR, TextSpec, read_source, split_sources
from billhook.data.token_sets import (
    MIN_ROW,
    Document,
    TokenSet,
    encode_texts,
    order_documents,
    pack_rows,
    special_prefix,
)
from billhook.models.structure import rope_boundary

SPLIT_BY_TEXT = 60  # with so many texts both halves hold enough of them for an interval

# -- calibration ----------------------------------------------------------------------------------------------------


def calibration_tokens(
    spec: TextSpec,
    model: Any,
    tokenizer: Any,
    watch: EventListener = ignore_events,
    *,
    held_out: str | None = None,
    self_share: float = 0.0,
    write: Callable[[], list[str]] | None = None,
    before_writing: Callable[[TokenSet | None], None] = lambda foreign: None,
    least: int | None = None,
    halved_by: Any | None = None,
) -> TokenSet:
    """Calibration tokens of a text, or of several in turn.

    Arguments:
        held_out: the source of the held-out text; of a source that is in it, half is kept. None: of every source.
        self_share: of the tokens, those that the model writes, if it can; in [0, 1).
        write: returns what the model writes, empty if it cannot; called after all other text was found long enough.
            None: `generate_share`.
        before_writing: called before that with the tokens that the model does not write, None if it writes all.
        least: so many tokens will do where the text holds no more. None: all of `spec.tokens`.
        halved_by: another tokenizer, by whose tokens texts are split into documents and halves.

    Raises:
        DataError: a text is too short, or the model has no tokenizer.
        UsageError: the sequences are longer than the model's positions.
    """
    _require_tokenizer(tokenizer)
    check_length(spec.length, model.config)
    spec = replace(spec, length=row_length(spec.length, model.config))
    found = _read_foreign(spec, (tokenizer, halved_by), watch, held_out)
    foreign = _foreign_parts(found, spec, self_share, tokenizer, least)  # too short a text is refused first of all
    name = f"{spec.source}+{SELF}" if self_share > 0 and SELF not in split_sources(spec.source) else spec.source
    before_writing(replace(_in_turn(foreign), source=name) if foreign else None)
    generated = write() if write is not None else generate_share(spec, self_share, model, tokenizer, watch)
    parts = _foreign_parts(found, spec, self_share if generated else 0.0, tokenizer, least)
    if generated:
        sources, tokens = split_sources(spec.source), generated_token_count(spec, self_share)
        written = order_documents(encode_texts(generated, tokenizer), spec.seed)
        part = pack_rows(written, tokens, spec.length, special_prefix(tokenizer), SELF)
        _require_tokens(part, tokens, _enough(tokens, sources, least), of=spec.tokens, halved=False)
        parts.insert(sources.index(SELF) if SELF in sources else len(parts), part)
    return _in_turn(parts)


Found = dict[str, tuple[list[Document], bool]]  # the documents of each source, and whether they are half of it


def _read_foreign(
    spec: TextSpec, tokenizers: tuple[Any, Any | None], watch: EventListener, held_out: str | None
) -> Found:
    """What is read of the sources that the model does not write."""
    found: Found = {}
    for source in split_sources(spec.source):
        if source != SELF:
            halved = held_out is None or source in split_sources(held_out)
            found[source] = _read(source, spec, tokenizers, 0 if halved else None, watch), halved
    return found


def _foreign_parts(
    found: Found, spec: TextSpec, self_share: float, tokenizer: Any, least: int | None
) -> list[TokenSet]:
    """A token set of each source, beside what the model writes of its own. Raises DataError for too short a source."""
    sources = split_sources(spec.source)
    own = 0 if SELF in sources else generated_token_count(spec, self_share)
    tokens = -(-(spec.tokens - own) // len(sources))
    parts = []
    for source in sources:
        if source != SELF:
            documents, halved = found[source]
            parts.append(pack_rows(documents, tokens, spec.length, special_prefix(tokenizer), source))
            _require_tokens(parts[-1], tokens, _enough(tokens, sources, least), of=spec.tokens, halved=halved)
    return parts


def _enough(tokens: int, sources: list[str], least: int | None) -> int:
    """How many of the `tokens` of one source must be there."""
    return tokens if least is None else -(-least // len(sources))


def _require_tokens(part: TokenSet, wanted: int, enough: int, *, of: int, halved: bool) -> None:
    """Raises DataError for fewer than `enough` tokens; `wanted`: those asked of this source; `of`: of all of them."""
    if part.tokens >= enough:
        return
    where = " in the half of it that is not kept for evaluation" if halved else ""
    share = f"{wanted:,} of the {of:,}" if wanted < of else f"{of:,}"
    fewer = part.tokens * of // wanted if part.tokens >= 2 * MIN_ROW else 0
    advice = f", or {option('tokens', fewer)}" if fewer else ""
    raise DataError(
        f"{option('data', part.source)} is too short: {share} calibration tokens are wanted of it, and it holds "
        f"{part.tokens:,}{where}. Give more text{advice}."
    )


def generated_token_count(spec: TextSpec, self_share: float) -> int:
    """How many calibration tokens the model itself should write."""
    sources = split_sources(spec.source)
    return -(-spec.tokens // len(sources)) if SELF in sources else round(self_share * spec.tokens)


def generate_share(
    spec: TextSpec, self_share: float, model: Any, tokenizer: Any, watch: EventListener = ignore_events
) -> list[str]:
    """The texts that the model writes for its calibration; none, and an event, if it cannot and need not."""
    if not (tokens := generated_token_count(spec, self_share)) or tokenizer is None:
        return []
    try:
        return generate_calibration(replace(spec, tokens=tokens), model, tokenizer, watch)
    except BillhookError as error:
        if SELF in split_sources(spec.source):
            raise
        watch(Event("calibrate", 1, 1, {"alone_on": spec.source, "because": str(error).split(". ")[0]}))
        return []


def generate_calibration(spec: TextSpec, model: Any, tokenizer: Any, watch: EventListener = ignore_events) -> list[str]:
    """Texts by the model, of a row's length, for all of `spec.tokens`. Raises UsageError if it is not in memory,
    DataError if it writes nothing."""
    if model.get_input_embeddings().weight.device.type == "meta":
        raise UsageError(
            "The model would write its calibration text itself, and it does not fit into memory. Give "
            f"{option('data')} a file."
        )
    tokens = 3 * spec.tokens // 2  # more than are wanted: a text may end in the middle of a row
    return sample_texts(model, tokenizer, tokens, spec.seed, length=spec.length, watch=watch)


def row_length(length: int, config: Any) -> int:
    """The length of rows: no more than the model's positions, nor than what has the same rope factors in any batch."""
    most = (getattr(config, "max_position_embeddings", None), rope_boundary(config))
    return min([length, *(each for each in most if each is not None)])


def check_length(length: int, config: Any) -> None:
    """Raises UsageError for a sequence length that the model has no positions for."""
    most = getattr(config, "max_position_embeddings", None)
    if length < 2 * MIN_ROW:
        raise UsageError(f"{option('length', length)} is too short. Use at least {2 * MIN_ROW} tokens a sequence.")
    if most is not None and length > most:
        raise UsageError(f"{option('length', length)} is longer than the model's {most} positions. Use at most {most}.")


# -- held-out text --------------------------------------------------------------------------------------------------


def held_out_tokens(
    spec: TextSpec,
    model: Any,
    tokenizer: Any,
    watch: EventListener = ignore_events,
    *,
    calibration: str | None = None,
    halved_by: Any | None = None,
) -> TokenSet:
    """Held-out tokens of a text, or of several in turn; sequences are no longer than the model's positions.

    Arguments:
        calibration: the source of the calibration text; of a source that is in it, half is kept from it.
            None: of every source.
        halved_by: as for `calibration_tokens`.

    Raises DataError if the text is too short, or is the model's own.
    """
    _require_tokenizer(tokenizer)
    require_foreign(spec.source)
    sources = split_sources(spec.source)
    length = row_length(spec.length, model.config)
    parts = []
    for source in sources:
        halved = calibration is None or source in split_sources(calibration)
        found = _read(source, spec, (tokenizer, halved_by), 1 if halved else None, watch)
        part = pack_rows(found, -(-spec.tokens // len(sources)), length, special_prefix(tokenizer), source)
        if part.tokens < 2 * MIN_ROW or len(part.clusters) < 2:
            raise DataError(
                f"Too little is left of {source} for evaluation. Give more text, or {option('eval_data', 'FILE')}."
            )
        parts.append(part)
    return _in_turn(parts)


def require_foreign(source: str) -> None:
    """Raises DataError for held-out text that the model would write."""
    if SELF in split_sources(source):
        raise DataError(
            f"{option('eval_data', 'self')} is not allowed: held-out text must not come from the model being "
            "evaluated. Give a "
            "file, or leave it out."
        )


def require_disjoint(calibration: TokenSet, held_out: TokenSet) -> None:
    """Raises DataError, which names both, if a document is in the calibration text and in the held-out text."""
    twice = len(set(calibration.digests) & set(held_out.digests))
    if not twice:
        return
    several = SOURCE_SEPARATOR in calibration.source
    raise DataError(
        f"{twice} documents of the held-out text {held_out.source} are in the calibration text {calibration.source} "
        f"too{' (some are in more than one source)' if several else ''}, so the comparison would be worth nothing. "
        f"Give other text, or leave {option('eval_data')} out: then held-out text is split off {option('data')}."
    )


# -- both -----------------------------------------------------------------------------------------------------------


def _require_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no text can be read. Put its tokenizer files into its folder.")


def _read(
    source: str, spec: TextSpec, tokenizers: tuple[Any, Any | None], half: int | None, watch: EventListener
) -> list[Document]:
    """The documents of one source, or of one half of it, in the order of the seed.

    `tokenizers`: whose tokens they have, and another one by which texts become documents and halves; None: the same.
    """
    own, other = tokenizers
    read = read_source(source, spec.field, own, tokens=spec.tokens, watch=watch)
    encoded = encode_texts(read.texts, own if other is None else other)
    found = order_documents(encoded, spec.seed)
    if half is not None:
        found = _halves(found, _places(encoded, read.whole))[half]
    first: dict[str, int] = {}
    same = [first.setdefault(text, number) for number, text in enumerate(read.texts)]
    found = [replace(document, text=same[document.text]) for document in found]
    return found if other is None else _spelled_anew(found, other, own)


def _spelled_anew(documents: list[Document], tokenizer: Any, other: Any) -> list[Document]:
    """Documents in the tokens of another tokenizer; those that are too short there are left out."""
    written = tokenizer.batch_decode([each.ids for each in documents], clean_up_tokenization_spaces=False)
    texts = [text.strip("\ufffd") for text in written]
    anew = [replace(d, ids=tuple(ids)) for d, ids in zip(documents, encode_texts(texts, other), strict=True)]
    return [document for document in anew if len(document.ids) >= MIN_ROW]


def _places(encoded: list[list[int]], whole: bool) -> dict[Document, int]:
    """A number for every document, by which texts are halved, whatever the seed."""
    order = order_documents(encoded, 0)
    texts = list(dict.fromkeys(document.text for document in order))
    by_text = len(texts) >= SPLIT_BY_TEXT
    if whole:
        ranks = {text: rank for rank, text in enumerate(texts)}
        return {d: ranks[d.text] if by_text else i for i, d in enumerate(order)}
    first = {d.text: d.digest() for d in reversed(order)}  # another sample of the same source is halved alike
    return {d: int(first[d.text] if by_text else d.digest(), 16) for d in order}


def _halves(documents: list[Document], places: dict[Document, int]) -> tuple[list[Document], list[Document]]:
    """Every second text for calibration, the others for evaluation, whatever amount is wanted and whatever the seed;
    where texts are few, every second document. A copy of a document for calibration is in neither."""
    even = [document for document in documents if places[document] % 2 == 0]
    seen = {document.ids for document in even}
    return even, [d for d in documents if places[d] % 2 and d.ids not in seen]


def _in_turn(parts: list[TokenSet]) -> TokenSet:
    return parts[0] if len(parts) == 1 else interleave(parts, SOURCE_SEPARATOR.join(part.source for part in parts))
