"""Calibration and evaluation tokens: read texts, split them into documents, pick rows, hash."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.errors import DataError, MissingExtra, UsageError, nearest
from billhook.records import EventListener, ignore_events
from billhook.sampling import sample_texts

DOCUMENT_TOKENS = 1024  # longer texts are split; the text stays the cluster for statistics
MIN_ROW = 8  # a row of fewer tokens tells nothing and costs as much padding as it saves
SPLIT_BY_TEXT = 60  # with so many texts both halves hold enough of them for an interval
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Choices:
    """What makes the rows of a token set the choices of items; an item is a document, its rows stand together.

    `truncate[r]`: where in row r the choice begins, at least 1; `characters[r]` of its text, without the blank before it.
    `gold[d]`: which of the rows of document d is right, counted from 0.
    """

    first: tuple[int, ...]
    characters: tuple[int, ...]
    gold: tuple[int, ...]


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

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tokens": self.tokens,
            "sequences": len(self.lengths),
            "documents": len(self.clusters),
            "texts": len(set(self.clusters)),
            "hash": self.hash,
        } | ({} if self.choices is None else {"items": len(self.choices.gold)})


@dataclass(frozen=True, slots=True)
class Document:
    """Up to 1,024 tokens of one text; `text` counts the texts of its source."""

    text: int
    ids: tuple[int, ...]

    def digest(self) -> str:
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]


# -- texts ----------------------------------------------------------------------------------------------------------


def read_texts(source: str, field: str, tokenizer: Any) -> list[str]:
    """The texts of `pydoc`, a .txt, .jsonl or .parquet file (.gz too), or a Hugging Face data set.

    Rows of .jsonl, .parquet and data sets give their `field`, or their `messages` through the chat template. Raises
    DataError for text that is empty, not UTF-8 or without the field, and MissingExtra where `datasets` is needed.
    """
    if source == "pydoc":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(source).expanduser()
    if path.is_file():
        texts = _read_file(path, field, tokenizer)
    elif path.exists() or any(suffix in path.suffixes for suffix in _TEXT_SUFFIXES):
        kind = "a folder" if path.is_dir() else "missing"
        raise DataError(f"{source} is {kind}. Give a .txt, .jsonl or .parquet file, pydoc, self, or a data set.")
    else:
        texts = _read_hub(source, field, tokenizer)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text. Give another .txt, .jsonl or .parquet file, or pydoc.")
    return texts


def _read_file(path: Path, field: str, tokenizer: Any) -> list[str]:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return _rows_to_texts(_dataset(kind[1:], data_files=str(path)), field, tokenizer, str(path))
    content = file_text(path)
    if kind in (".jsonl", ".json"):
        return _rows_to_texts([row for _, row in json_lines(content, str(path))], field, tokenizer, str(path))
    return [content]


def file_text(path: Path) -> str:
    """The UTF-8 text of a file, unpacked if it ends in .gz. Raises DataError."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no gzip file, or a damaged one ({error}). Compress the text again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it: iconv -t UTF-8 {path.name}") from error


def json_lines(content: str, source: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of .jsonl text that is not blank. Raises DataError."""
    for number, line in enumerate(content.split("\n"), 1):  # a text may hold U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}, line {number}, is not JSON ({error.msg}). One object a line, please."
                ) from error


def _read_hub(source: str, field: str, tokenizer: Any) -> list[str]:
    """`name`, `name:config` or `name:config:split` (split `train` if not given)."""
    name, config, split = (*source.split(":"), None, None)[:3]
    return _rows_to_texts(_dataset(name or "", config or None, split=split or "train"), field, tokenizer, source)


def _dataset(name: str, config: str | None = None, **options: Any) -> Iterable[dict[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"Reading the data set {name!r}", "data")
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, config, **({"split": "train"} | options))
    except Exception as error:  # the hub's and the library's own exceptions, of many kinds
        reason = str(error).strip().split("\n")[0][:200]
        if file := options.get("data_files"):
            raise DataError(f"{file} cannot be read as .{name} ({reason}). Write or download it again.") from error
        raise DataError(
            f"There is no file {name!r}, and the data set cannot be loaded ({type(error).__name__}: {reason}). Give a "
            "local .txt, .jsonl or .parquet file, or check the name."
        ) from error
    return rows


def _rows_to_texts(rows: Iterable[dict[str, Any]], field: str, tokenizer: Any, source: str) -> list[str]:
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}, is no object with a field {field!r}.")
        if field in row and isinstance(row[field], str):
            texts.append(row[field])
        elif isinstance(row.get("messages"), list):
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(f"{source} holds chats, and this model's tokenizer has no chat template.")
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        else:
            near = nearest(field, row)
            guess = f" Did you mean --field {near}?" if near else ""
            raise DataError(f"{source}, row {number}, has no text field {field!r}.{guess} It has: {', '.join(row)}.")
    return texts


# -- documents ------------------------------------------------------------------------------------------------------


def documents(texts: list[str], tokenizer: Any, seed: int) -> list[Document]:
    """Texts as documents of at most 1,024 tokens, in a seeded order that takes every text once before any twice."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    encoded = tokenizer([texts[i] for i in order], add_special_tokens=False, verbose=False)["input_ids"]
    split = [
        (start // DOCUMENT_TOKENS, rank, Document(text, tuple(ids[start : start + DOCUMENT_TOKENS])))
        for rank, (text, ids) in enumerate(zip(order, encoded, strict=True))
        for start in range(0, len(ids), DOCUMENT_TOKENS)
    ]
    return [document for _, _, document in sorted(split, key=lambda entry: entry[:2]) if len(document.ids) >= MIN_ROW]


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord (a BOS token, or nothing)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: len(full) - len(bare)]) if full[-len(bare) :] == bare else []


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
        part = Choices(part.first[: len(rows)], part.characters[: len(rows)], part.gold[:kept])
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
