"""Calibration and held-out tokens of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from billhook.core.errors import BillhookError, DataError, UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.data.generated import sample_texts
from billhook.data.splits import interleave
from billhook.data.texts import read_texts
from billhook.data.token_sets import MIN_ROW, Document, TokenSet, documents, pack_rows, special_prefix

SPLIT_BY_TEXT = 60  # with so many texts both halves hold enough of them for an interval


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Where tokens come from and how many: calibration from `data`, evaluation from `eval_data` or what is left.

    `least`: so many calibration tokens will do where the text holds no more; None: all that are wanted. `self_share`:
    of the calibration tokens, in [0, 1), those that the model writes itself (`portions.mixed_sets`). `in_all`: the
    calibration tokens of all sources, where `tokens` are the part of this one.
    """

    data: str
    eval_data: str | None
    field: str
    tokens: int
    length: int
    eval_tokens: int
    eval_length: int
    seed: int
    least: int | None = None
    self_share: float = 0.0
    in_all: int | None = None


def token_sets(
    spec: TextSpec,
    model: Any,
    tokenizer: Any,
    watch: EventListener = ignore_events,
    *,
    generated: list[str] | None = None,
) -> tuple[TokenSet, TokenSet]:
    """Calibration and evaluation tokens, disjoint by document. `generated`: what the model wrote before, for data `self`.

    Raises DataError if a text is too short, or if a document is in both; UsageError if a sequence is longer than the
    model's positions.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so no text can be read. Put its tokenizer files into its folder.")
    if spec.eval_data == "self":
        raise DataError("--eval-data self would prove the model on its own words. Give a file, or leave it out.")
    check_length(spec.length, model.config)
    prefix = special_prefix(tokenizer)
    eval_length = min(spec.eval_length, getattr(model.config, "max_position_embeddings", spec.eval_length))
    same = spec.data != "self" and spec.eval_data in (None, spec.data)
    if spec.data == "self":
        texts = generated or generate_calibration(spec, model, tokenizer, watch)
    else:
        texts = read_texts(spec.data, spec.field, tokenizer)
    found = documents(texts, tokenizer, spec.seed)
    order = documents(texts, tokenizer, 0) if same and spec.seed else found
    mine, rest = _split(found, order) if same else (found, [])
    calibration = pack_rows(mine, spec.tokens, spec.length, prefix, spec.data)
    if calibration.tokens < (spec.tokens if spec.least is None else spec.least):
        where = " in the half of it that is not kept for evaluation" if same else ""
        in_all = spec.in_all or spec.tokens
        part = f"{spec.tokens:,} of the {in_all:,}" if spec.tokens < in_all else f"{in_all:,}"
        fewer = calibration.tokens * in_all // spec.tokens if calibration.tokens >= 2 * MIN_ROW else 0
        raise DataError(
            f"--data {spec.data} is too short: {part} calibration tokens are wanted of it, and it holds "
            f"{calibration.tokens:,}{where}. Give more text{f', or --tokens {fewer}' if fewer else ''}."
        )
    held = spec.data if same else spec.eval_data or "pydoc"
    if not same:
        rest = documents(read_texts(held, spec.field, tokenizer), tokenizer, spec.seed)
    evaluation = pack_rows(rest, spec.eval_tokens, eval_length, prefix, held)
    if evaluation.tokens < 2 * MIN_ROW or len(evaluation.clusters) < 2:
        raise DataError(f"Too little is left of {held} for evaluation. Give more text, or --eval-data FILE.")
    twice = len(set(calibration.digests) & set(evaluation.digests))
    if twice:
        raise DataError(
            f"{twice} documents of --eval-data {held} are in the calibration text too, so the proof would be worth "
            "nothing. Give other text, or leave --eval-data out: then evaluation text is split off --data."
        )
    return calibration, evaluation


def generate_calibration(spec: TextSpec, model: Any, tokenizer: Any, watch: EventListener = ignore_events) -> list[str]:
    """Texts by the model, of a row's length, for all of `spec.tokens`. Raises UsageError if it is not in memory,
    DataError if it writes nothing."""
    if model.get_input_embeddings().weight.device.type == "meta":
        raise UsageError("--data self lets the model write, and it does not fit into memory. Give --data a file.")
    tokens = 3 * spec.tokens // 2  # more than are wanted: a text may end in the middle of a row
    return sample_texts(model, tokenizer, tokens, spec.seed, length=spec.length, watch=watch)


def _split(documents: list[Document], order: list[Document]) -> tuple[list[Document], list[Document]]:
    """Every second text for calibration, the others for evaluation, whatever amount is wanted and whatever the seed;
    where texts are few, every second document of `order`. A copy of a document for calibration is in neither."""
    texts = {text: rank for rank, text in enumerate(dict.fromkeys(document.text for document in order))}
    places = {d: texts[d.text] if len(texts) >= SPLIT_BY_TEXT else i for i, d in enumerate(order)}
    mine = [document for document in documents if places[document] % 2 == 0]
    seen = {document.ids for document in mine}
    return mine, [d for d in documents if places[d] % 2 and d.ids not in seen]


def check_length(length: int, config: Any) -> None:
    """Raises UsageError for a sequence length that the model has no positions for."""
    most = getattr(config, "max_position_embeddings", None)
    if length < 2 * MIN_ROW:
        raise UsageError(f"--length {length} is too short. Use at least {2 * MIN_ROW} tokens a sequence.")
    if most is not None and length > most:
        raise UsageError(f"--length {length} is longer than the model's {most} positions. Use at most {most}.")


SOURCE_SEPARATOR = "+"  # between the sources of a mixture


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
