"""The one door for what others wrote: files and structures of any content, read or refused with one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from billhook.core.errors import BillhookError, ModelError, RecipeError, cannot_write
from billhook.core.results.json_form import JsonObject

if TYPE_CHECKING:
    import yaml
    from pydantic import TypeAdapter

T = TypeVar("T")

MOST_BYTES = 32 * 2**20  # of a JSON file; in memory it takes up to twenty times as much
MOST_LEVELS = 100  # of lists and objects inside each other
MOST_SHOWN = 80  # characters of a value in a message

AGAIN = "Download the file again."


@contextmanager
def reading(told: str, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> Iterator[None]:
    """Turn whatever a library raises over a foreign file into `error`: `told`, the reason in brackets, then `advice`.

    Errors of Billhook, interrupts, and a machine without memory or disk pass.
    """
    try:
        yield
    except BillhookError:
        raise
    except BaseException as caught:
        rust = type(caught).__name__ == "PanicException"  # of a library in Rust, no Exception of Python's
        if _lacks_room(caught) or not (rust or isinstance(caught, Exception)):
            raise
        raise error(f"{told} ({_reason(caught)}). {advice}") from caught


def _lacks_room(caught: BaseException) -> bool:
    memory = type(caught).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(caught)
    return cannot_write(caught) or memory or isinstance(caught, MemoryError)


def _reason(caught: BaseException) -> str:
    """The type of an error, and the beginning of what it says."""
    words = " ".join(str(caught).split())
    return f"{type(caught).__name__}: {words[:300]}" if words else type(caught).__name__


def read_bytes(path: Path, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> bytes:
    """The content of a file. Raises `error` where it cannot be read, or is too large for what it should hold."""
    with reading(f"{path} cannot be read", error, advice), path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise error(f"{path} has more than {MOST_BYTES // 2**20} MB, which no file of its kind has. {advice}")
    return raw


def parse_json(raw: bytes | str, where: object, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> Any:
    """A JSON value. Raises `error` where it is none, or is nested too deep."""
    with reading(f"{where} is not valid JSON", error, advice):
        value = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    if _levels(value) > MOST_LEVELS:
        raise error(f"{where} nests lists and objects more than {MOST_LEVELS} deep. {advice}")
    return value


def read_json(path: Path, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> Any:
    """The JSON value of a file. Raises `error` as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, error, advice), path, error, advice)


def read_json_object(path: Path, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> JsonObject:
    """The JSON object of a file. Raises `error` as `read_json`, and where it holds something else."""
    value = read_json(path, error, advice)
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object. {advice}")
    return value


def _levels(value: Any) -> int:
    levels, layer = 0, [value]
    while layer and levels <= MOST_LEVELS:
        levels += 1
        inside = (each.values() if isinstance(each, dict) else each for each in layer if isinstance(each, dict | list))
        layer = [part for parts in inside for part in parts if isinstance(part, dict | list)]
    return levels


def validated(kind: type[T], value: Any, where: str, error: type[BillhookError] = ModelError, advice: str = AGAIN) -> T:
    """A foreign `value` as `kind`, a type that pydantic knows. Raises `error` that names the key and what it holds."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value)  # type: ignore[no-any-return, arg-type]
    except ValidationError as caught:
        first = caught.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "a value"
        raise error(f"{where} has {key}: {shown(first['input'])}. {first['msg']}. {advice}") from caught


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def shown(value: object) -> str:
    """A foreign value as a message shows it: its beginning."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def every_value(value: object) -> Iterator[object]:
    """Every value inside a value, and that itself."""
    waiting = [iter((value,))]
    while waiting:
        for each in waiting[-1]:
            yield each
            if isinstance(each, dict | list | tuple | set):
                waiting.append(iter((*each, *each.values()) if isinstance(each, dict) else each))
                break
        else:
            waiting.pop()


def load_unique_yaml(text: str, what: str = "recipe") -> Any:
    """The value of safe YAML in which a key may stand only once in a map, however it is spelled.

    `what`: the name of the file in a message. Raises RecipeError for a key that stands twice.
    """
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            marks: dict[Any, yaml.Mark] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                here = key.start_mark
                first = marks.setdefault(self.construct_object(key), here)
                if first is not here:
                    both = f"lines {first.line + 1} and {here.line + 1}"
                    both = both if first.line != here.line else f"line {here.line + 1}"
                    raise RecipeError(f"The {what} has {key.value!r} twice, in {both}. Keep one of them.")
            return dict(super().construct_mapping(node, deep))

    return yaml.load(text, Loader=UniqueKeys)
