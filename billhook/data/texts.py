"""Texts from files, data sets and the documentation that every Python carries."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import DataError, MissingExtra, UsageError, nearest, option
from billhook.core.results.json_form import JsonObject
from billhook.data.chat_templates import render_chat

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

SELF = "self"  # the source that the model writes

SOURCE_SEPARATOR = "+"  # between the sources of a mixture


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
    sources = [source] if Path(source).exists() else source.split(SOURCE_SEPARATOR)
    if not all(sources):
        raise UsageError(f"{option('data', source)} mixes sources, and one of them is empty. Write my.jsonl+self.")
    return sources


def external_sources(source: str) -> str:
    """The sources of a mixture without what the model writes; empty if there are none."""
    return SOURCE_SEPARATOR.join(each for each in split_sources(source) if each != SELF)


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


def _dataset(name: str, config: str | None = None, **options: Any) -> Iterable[JsonObject]:
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"Reading the data set {name!r}", "data")
    import datasets

    try:
        rows: Iterable[JsonObject] = datasets.load_dataset(name, config, **({"split": "train"} | options))
    except Exception as error:  # the hub's and the library's own exceptions, of many kinds
        reason = str(error).strip().split("\n")[0][:200]
        if file := options.get("data_files"):
            raise DataError(f"{file} cannot be read as .{name} ({reason}). Write or download it again.") from error
        raise DataError(
            f"There is no file {name!r}, and the data set cannot be loaded ({type(error).__name__}: {reason}). Give a "
            "local .txt, .jsonl or .parquet file, or check the name."
        ) from error
    return rows


def _rows_to_texts(rows: Iterable[JsonObject], field: str, tokenizer: Any, source: str) -> list[str]:
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}, is no object with a field {field!r}.")
        if field in row and isinstance(row[field], str):
            texts.append(row[field])
        elif isinstance(row.get("messages"), list):
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(f"{source} holds chats, and this model's tokenizer has no chat template.")
            texts.append(render_chat(tokenizer, row["messages"]))
        else:
            near = nearest(field, row)
            guess = f" Did you mean {option('field')} {near}?" if near else ""
            raise DataError(f"{source}, row {number}, has no text field {field!r}.{guess} It has: {', '.join(row)}.")
    return texts
