"""Texts from files, data sets and the documentation that every Python carries."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import DataError, MissingExtra, UsageError, nearest, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan_files import find_path
from billhook.core.results.json_form import JsonObject
from billhook.data.chats import CHAT_FIELDS, chat_text
from billhook.data.rows import (
    COLUMNS,
    DELIMITERS,
    JSON_LINES,
    TEXT_SUFFIXES,
    Row,
    Sample,
    UnusableRow,
    draw_sample,
    first_text,
    is_text,
    kind_of,
    leave_out,
    sample_columns,
    sample_json,
    sample_table,
)

SELF = "self"  # the source that the model writes

SOURCE_SEPARATOR = "+"  # between the sources of a mixture

DATA_SET = r"[\w.-]{1,96}(/[\w.-]{1,96})?(:[^:\n]{0,96}){0,2}"  # name, name:config or name:config:split


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Text, and how many tokens of it.

    Fields:
        source: what `read_texts` takes; several with + between them give as many tokens each.
        field: the field of a row that holds the text.
        tokens: how many in all.
        length: tokens per sequence at most, those that the tokenizer puts first included.
        seed: of the order of the texts.
    """

    source: str
    field: str
    tokens: int
    length: int
    seed: int


def split_sources(source: str) -> list[str]:
    """The sources of a mixture. A file whose name has a + is one source. Raises UsageError for an empty source."""
    sources = [source] if find_path(source) is not None else source.split(SOURCE_SEPARATOR)
    if not all(sources):
        raise UsageError(f"{option('data', source)} mixes sources, and one of them is empty. Write my.jsonl+self.")
    return sources


def external_sources(source: str) -> str:
    """The sources of a mixture without what the model writes; empty if there are none."""
    return SOURCE_SEPARATOR.join(each for each in split_sources(source) if each != SELF)


def require_given(source: str) -> None:
    """Raise DataError for text that the model writes, where text must say what the model is for."""
    if SELF in split_sources(source):
        raise DataError(
            f"{option('data', source)}: the model's own text does not say what it is for. Give a file, a data set's "
            "name or pydoc."
        )


# -- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one source; not `whole` where the source is too large, and these are a sample of it."""

    texts: list[str]
    whole: bool = True


def read_texts(source: str, field: str, tokenizer: Any, watch: EventListener = ignore_events) -> list[str]:
    """The texts of a source as `read_source` reads them, or a sample of them."""
    return read_source(source, field, tokenizer, watch=watch).texts


def read_source(
    source: str, field: str, tokenizer: Any, *, tokens: int = 0, watch: EventListener = ignore_events
) -> Texts:
    """The texts of `pydoc`, of a file, or of a Hugging Face data set.

    - .txt and files without a suffix that is known here: one text.
    - .jsonl, .json, .csv, .tsv, .parquet, .arrow, data sets: of each row its `field`, several with commas between them,
      or its chat through the chat template.
    - .gz, .xz, .bz2 and .zst of these.
    - `tokens`: how many are wanted, so that a sample of a large file is large enough.

    Raises DataError for text that is empty, not UTF-8 or without the field, and MissingExtra where the extra `data` is
    needed.
    """
    if source == "pydoc":
        from pydoc_data.topics import topics

        return Texts([topics[name] for name in sorted(topics)])
    path = find_file(source)
    if path is None:
        found = _texts_of_hub(source, field, tokenizer, tokens, watch)
    else:
        found = _texts_of_file(path, field, tokenizer, tokens, watch)
    texts = [text for text in found.texts if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text. Give another .txt, .jsonl or .parquet file, or pydoc.")
    return Texts(texts, found.whole)


def find_file(source: str) -> Path | None:
    """The file that a source names; None for what may be a data set's name. Raises DataError if it is neither."""
    path = find_path(source)
    if path is not None and path.is_file():
        return path
    kind = "" if path is None else "a folder" if path.is_dir() else "not a regular file"
    if kind_of(Path(source)) in TEXT_SUFFIXES or not re.fullmatch(DATA_SET, source):
        kind = kind or "missing"
    if kind:
        name = source if len(source) <= 200 else f"{source[:200]}…"
        raise DataError(f"{name} is {kind}. Give a .txt, .jsonl or .parquet file, pydoc, self, or a data set.")
    return None


def require_sources(source: str) -> None:
    """Raise DataError for a source of a mixture that is not there, and MissingExtra where one needs that."""
    for each in split_sources(source):
        if each not in (SELF, "pydoc"):
            path = find_file(each)
            package = "datasets" if path is None else "pyarrow" if kind_of(path) in COLUMNS else ""
            if package and importlib.util.find_spec(package) is None:
                raise MissingExtra(f"Reading {each!r}", "data")


def _texts_of_file(path: Path, field: str, tokenizer: Any, tokens: int, watch: EventListener) -> Texts:
    kind = kind_of(path)
    if kind in JSON_LINES:
        rows: Sample[Any] = sample_json(path, tokens)
    elif kind in DELIMITERS:
        rows = sample_table(path, tokens)
    elif kind in COLUMNS:
        rows = sample_columns(path, tokens, (field, *_names(field), *CHAT_FIELDS))
    else:
        text = first_text(path, tokens)
        return Texts([row.value for row in text.rows], text.whole)
    return Texts(_rows_to_texts(rows.rows, field, tokenizer, str(path), watch), rows.whole)


def _texts_of_hub(source: str, field: str, tokenizer: Any, tokens: int, watch: EventListener) -> Texts:
    """`name`, `name:config` or `name:config:split` (split `train` if not given)."""
    name, config, split = (*source.split(":"), None, None)[:3]
    numbered = enumerate(_data_set(name or "", config or None, split or "train"), 1)
    rows = draw_sample((Row(number, _size(value), value) for number, value in numbered), tokens)
    return Texts(_rows_to_texts(rows.rows, field, tokenizer, source, watch), rows.whole)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else len(str(value))


def _data_set(name: str, config: str | None, split: str) -> Iterable[JsonObject]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"Reading the data set {name!r}", "data")
    import datasets

    try:
        rows: Iterable[JsonObject] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's and the library's own exceptions, of many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"There is no file {name!r}, and the data set cannot be loaded ({type(error).__name__}: {reason}). Give a "
            "local .txt, .jsonl or .parquet file, or check the name."
        ) from error
    return rows


# -- rows -----------------------------------------------------------------------------------------------------------


def _names(field: str) -> list[str]:
    """The fields of a field that joins several."""
    return [name.strip() for name in field.split(",") if name.strip()]


def _rows_to_texts(
    rows: Sequence[Row[Any]], field: str, tokenizer: Any, source: str, watch: EventListener
) -> list[str]:
    """The text of every row. Rows whose chat no template takes, and with half a character, are left out if few."""
    texts: list[str] = []
    unusable: list[str] = []
    for row in rows:
        try:
            text = _row_text(row.value, field, tokenizer, source, row.number)
            if not is_text(text):
                raise UnusableRow(
                    f"{source}, row {row.number}, holds half of a surrogate pair, which is no character. Leave the row "
                    "out."
                )
            texts.append(text)
        except UnusableRow as error:
            unusable.append(error.message)
    leave_out(unusable, len(rows), source, watch)
    names = _names(field)
    absent = next((name for name in names if not any(name in row.value for row in rows)), None)
    if len(names) > 1 and absent is not None and not any(field in row.value for row in rows):
        raise DataError(f"No row of {source} has the field {absent!r}. It has: {', '.join(map(str, rows[0].value))}.")
    return texts


def _row_text(row: Any, field: str, tokenizer: Any, source: str, number: int) -> str:
    where = f"{source}, row {number},"
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object with a field {field!r}.")
    value = row.get(field)
    if isinstance(value, str):
        return value
    chat = next((row[name] for name in (field, *CHAT_FIELDS) if isinstance(row.get(name), list)), None)
    if chat is not None:
        return chat_text(chat, tokenizer, source, number)
    if field in row:
        raise DataError(f"{where} has {_shown(value)} as its {field!r}. Give a text there, or leave the row out.")
    names = _names(field)
    if len(names) > 1 and (parts := [row[name] for name in names if row.get(name) not in (None, "")]):
        if wrong := [part for part in parts if not isinstance(part, str)]:
            raise DataError(f"{where} has {_shown(wrong[0])} in one of {', '.join(names)}. Give texts there.")
        return "\n\n".join(parts)
    raise DataError(f"{where} has no text field {field!r}.{_advice(field, row)} It has: {', '.join(map(str, row))}.")


def _advice(field: str, row: JsonObject) -> str:
    """What to type for the field that is meant, or for several."""
    if near := nearest(field, map(str, row)):
        return f" Did you mean {option('field')} {near}?"
    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    return f" Several are joined by {option('field', texts)}." if len(texts) > 1 else ""


def _shown(value: Any) -> str:
    """A value as JSON has it, its beginning."""
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError):
        return str(value)[:60]
