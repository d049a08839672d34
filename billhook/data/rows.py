"""Rows of files: text, lines of JSON and tables, unpacked as they are read and held in bounded memory."""

from __future__ import annotations

import bz2
import csv
import gzip
import heapq
import importlib.util
import io
import json
import lzma
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

from billhook.core.errors import DataError, MissingExtra
from billhook.core.events import Event, EventListener, EventValue

T = TypeVar("T")

WHOLE = 1 << 24  # bytes of a file, unpacked, up to which all of it is read
SAMPLE = 1 << 22  # bytes that are kept of a larger file
BYTES_A_TOKEN = 32  # that are kept at least, for every token that is wanted
WINDOW = 8  # times what is kept is looked at, from the beginning of the file
MOST = 1 << 28  # bytes of a file that is needed whole, such as a task
LONGEST = WHOLE  # bytes of one line
FEW = 10  # one row in so many may be left out
PACKED = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
COLUMNS = (".parquet", ".arrow")
TEXT_SUFFIXES = (".txt", *JSON_LINES, *DELIMITERS, *COLUMNS)


class UnusableRow(DataError):
    """A row that may be left out if few are like it."""


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """`number`: its line in the file, or its row in a table, from 1; `size` in bytes, about."""

    number: int
    size: int
    value: T


@dataclass(frozen=True, slots=True)
class Sample(Generic[T]):
    """All rows of a file in order, or those of a seeded sample, which is not `whole`."""

    rows: tuple[Row[T], ...]
    whole: bool


def kind_of(path: Path) -> str:
    """The suffix of a file below that of its packing, lowercase; empty without one."""
    suffixes = [s for s in map(str.lower, path.suffixes) if s not in PACKED]
    return suffixes[-1] if suffixes else ""


def draw_sample(rows: Iterable[Row[T]], tokens: int = 0) -> Sample[T]:
    """All rows of up to 16 MB; of more, 4 MB, seeded, out of the first 32 MB, or 32 bytes for each of `tokens` out of
    eight times as many. Memory is bounded by what is kept."""
    most, draw = sample_size(tokens), random.Random(0)
    kept: list[tuple[float, int, Row[T]]] = []
    held = read = 0
    for row in rows:
        read += row.size
        held += row.size
        heapq.heappush(kept, (-draw.random(), row.number, row))
        while held > (WHOLE if read <= WHOLE else most) and len(kept) > 1:
            held -= heapq.heappop(kept)[2].size
        if read > WINDOW * most:
            break
    return Sample(tuple(sorted((row for _, _, row in kept), key=lambda row: row.number)), read <= WHOLE)


def sample_size(tokens: int) -> int:
    """How many bytes are kept of a file that is too large to be read whole."""
    return max(SAMPLE, BYTES_A_TOKEN * tokens)


def leave_out(reasons: list[str], total: int, source: str, watch: EventListener) -> None:
    """Tell of rows that are left out, and why the first one is. Raises DataError if more than one in ten are."""
    if not reasons:
        return
    if FEW * len(reasons) > total:
        raise DataError(f"{reasons[0]} So it is with {len(reasons):,} of {total:,} rows, too many to go on without.")
    values: dict[str, EventValue] = {"of": source, "left_out": len(reasons), "note": reasons[0]}
    watch(Event("read", total - len(reasons), total, values))


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- bytes ----------------------------------------------------------------------------------------------------------


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. Raises DataError if it is damaged, inside too."""
    packing = PACKED.get(path.suffix.lower())
    try:
        with _opened(path, packing) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        if packing is None or isinstance(error, FileNotFoundError | PermissionError):
            raise DataError(f"{path} cannot be read ({error}). Give a file that can be.") from error
        raise DataError(f"{path} is no {packing} file, or a damaged one ({error}). Compress the text again.") from error


def _opened(path: Path, packing: str | None) -> BinaryIO:
    if packing == "zstd":
        if importlib.util.find_spec("pyarrow") is None:
            raise DataError(f"{path} is packed by zstd, which needs the extra `data`. Unpack it: zstd -d {path.name}")
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    opens: dict[str | None, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
    return cast(BinaryIO, opens.get(packing, Path.open)(path, "rb"))


def first_text(path: Path, tokens: int = 0) -> Sample[str]:
    """The text of a file as one row, or as much of its beginning as a sample has. Raises DataError."""
    with _unpacked(path) as file:
        raw = file.read(WHOLE + 1)
        if whole := len(raw) <= WHOLE:
            return Sample((Row(1, len(raw), _decoded(raw, path)),), whole)
        size = sample_size(tokens)
        raw = raw[:size] + file.read(size - len(raw)) if size > len(raw) else raw[:size]
    return Sample((Row(1, len(raw), _decoded(raw, path, end=False)),), whole)


def file_text(path: Path) -> str:
    """All of the UTF-8 text of a file, unpacked. Raises DataError, also for more than 256 MB."""
    return "".join(row.value for row in lines(path, MOST))


def lines(path: Path, most: int | None = None) -> Iterator[Row[str]]:
    """The lines of a text file, with their ends. Raises DataError, also for more than `most` bytes."""
    number = read = 0
    with _unpacked(path) as file:
        while raw := file.readline(LONGEST + 1):
            number += 1
            read += len(raw)
            if len(raw) > LONGEST:
                raise DataError(f"{path}, line {number}, has more than {LONGEST >> 20} MB. Give shorter lines.")
            if most is not None and read > most:
                raise DataError(f"{path} holds more than {most >> 20} MB of text. Give a part of it: head -n 10000")
            yield Row(number, len(raw), _decoded(raw, path, start=number == 1))


def _decoded(raw: bytes, path: Path, *, start: bool = True, end: bool = True) -> str:
    """Bytes as UTF-8 text; `start`: they begin the file; `end`: they do not stop within a character."""
    raw = raw.removeprefix(b"\xef\xbb\xbf") if start else raw
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if not end and error.start > len(raw) - 4:
            return raw[: error.start].decode()
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it: iconv -t UTF-8 {path.name}") from error
    if "\0" in text:
        raise DataError(f"{path} is not UTF-8 text: it holds zero bytes. Give a text file.")
    return text


# -- rows -----------------------------------------------------------------------------------------------------------


def parse_json(text: str, where: str) -> Any:
    """The value of a line of JSON. Raises DataError, which begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}, is not JSON ({reason}). One object a line, please.") from error


def json_lines(path: Path, source: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a .jsonl file that is not blank. Raises DataError."""
    for row in lines(path, MOST):
        if row.value.strip():
            yield row.number, parse_json(row.value, f"{source}, line {row.number}")


def sample_json(path: Path, tokens: int) -> Sample[Any]:
    """Rows of a .jsonl file, or of a .json file that is one array."""
    if kind_of(path) == ".json" and next((r.value for r in lines(path) if r.value.strip()), "").lstrip()[:1] == "[":
        return draw_sample(_array(path), tokens)
    drawn = draw_sample((row for row in lines(path) if row.value.strip()), tokens)
    parsed = (Row(row.number, row.size, parse_json(row.value, f"{path}, line {row.number}")) for row in drawn.rows)
    return Sample(tuple(parsed), drawn.whole)


def _array(path: Path) -> Iterator[Row[Any]]:
    text = "".join(row.value for row in lines(path, 2 * WHOLE))
    found = parse_json(text, f"{path}, line 1")
    for number, value in enumerate(found, 1):
        yield Row(number, len(text) // len(found), value)


def sample_table(path: Path, tokens: int) -> Sample[dict[str, Any]]:
    """Rows of a .csv or .tsv file, whose first line names the fields."""

    def rows() -> Iterator[Row[dict[str, Any]]]:
        csv.field_size_limit(LONGEST)
        table = csv.DictReader((row.value for row in lines(path)), delimiter=DELIMITERS[kind_of(path)], restkey="")
        try:
            for row in table:
                yield Row(table.line_num, sum(len(str(value)) for value in row.values()), row)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {table.line_num}, is not a row of a table ({error}). Close its quotes."
            ) from error

    return draw_sample(rows(), tokens)


def sample_columns(path: Path, tokens: int, fields: Iterable[str]) -> Sample[dict[str, Any]]:
    """Rows of a .parquet or .arrow file, with the `fields` that it has; all, if it has none of them."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED:
        raise DataError(f"{path} is packed, and .{kind[1:]} files are read where they lie. Unpack it first.")
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra(f"Reading {path.name}", "data")
    import pyarrow

    def rows() -> Iterator[Row[dict[str, Any]]]:
        number = 0
        for batch in _batches(path, kind, fields):
            size = batch.nbytes // max(1, batch.num_rows)
            for start in range(0, batch.num_rows, 64):
                for value in batch.slice(start, 64).to_pylist():
                    number += 1
                    yield Row(number, size, value)

    try:
        return draw_sample(rows(), tokens)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(f"{path} cannot be read as {kind} ({reason}). Write or download it again.") from error


def _batches(path: Path, kind: str, fields: Iterable[str]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [name for name in fields if name in file.schema_arrow.names]
            yield from file.iter_batches(1024, columns=wanted or None)
        return
    with pyarrow.memory_map(str(path)) as memory:
        try:
            stream = pyarrow.ipc.open_stream(memory)
        except pyarrow.ArrowInvalid:  # the other form of the same format
            table = pyarrow.ipc.open_file(memory)
            stream = (table.get_batch(i) for i in range(table.num_record_batches))
        for batch in stream:
            wanted = [name for name in fields if name in batch.schema.names]
            yield batch.select(wanted) if wanted else batch
