"""Results as JSON and back: one form for every frozen dataclass that a run or a study stores."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from html import escape
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from billhook.core.errors import ResultError

T = TypeVar("T")
Row = dict[str, str | int | float | None]  # a line of a flat table: column, cell
JsonObject = dict[str, Any]  # a JSON object, as json.loads gives it
SCHEMA = 2  # of all results; Billhook before 0.2 wrote results without one

RESULTS: dict[str, type[Result]] = {}  # by kind


@dataclass(frozen=True, repr=False)
class Result:
    """What a run or a study found: numbers and reasons, no sentences. Abstract; frozen dataclasses extend it.

    `kind` names it in the store. `to_json` and `from_json` are inverse to each other; `rows` is what
    `pandas.DataFrame` takes, a flat dictionary each; a notebook shows these rows as a table.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__ and RESULTS.setdefault(cls.kind, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"Two classes of results have the kind {cls.kind!r}. Rename one of them.")

    def to_json(self) -> JsonObject:
        """Every field as plain JSON, with `schema` and `kind`. Infinite ends of intervals are strings."""
        return {"schema": SCHEMA, "kind": self.kind, **encode(self)}

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """The result that `to_json` wrote. Raises ResultError for one of another schema, or an incomplete one."""
        told: JsonObject = value if isinstance(value, dict) else {}
        if told.get("schema") != SCHEMA or told.get("kind") != cls.kind:
            raise ResultError(
                f"This result has schema {told.get('schema', 1)} and kind {told.get('kind', 'unknown')!r}, and this "
                f"Billhook reads schema {SCHEMA} of {cls.kind!r}. Run the command again: what the store holds is "
                "not measured again."
            )
        return decode(cls, value)

    def rows(self) -> list[Row]:
        """The result as a flat table: a dictionary a line, equal keys in each."""
        raise NotImplementedError

    def __repr__(self) -> str:
        rows = self.rows()
        return f"{type(self).__name__}({len(rows)} row{'' if len(rows) == 1 else 's'}: .rows(), .to_json())"

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = ("<tr>" + "".join(f"<td>{escape(cell_text(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


@dataclass(frozen=True, repr=False)
class PagedResult(Result):
    """A result that has a page. `page`: its file; empty where none was written."""

    page: str = field(default="", kw_only=True)


def cell_text(value: object) -> str:
    """A cell of `rows` as text: four digits of a number, nothing for None."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def encode(value: Any) -> Any:
    """A value of results as plain JSON: dataclasses as objects, tuples as lists, infinite numbers as strings.

    A class with its own `to_json`, such as `Plan`, writes itself.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, Result) and hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(name): encode(each) for name, each in value.items()}
    if isinstance(value, Fraction):
        return str(value)
    assert isinstance(value, tuple | list), f"{type(value)} has no JSON form"
    return [encode(each) for each in value]


def decode(kind: type[T], value: Any) -> T:
    """The value of type `kind` that `encode` wrote. Raises ResultError where a field is missing or of another type."""
    return _decode(kind, value, kind.__name__)  # type: ignore[no-any-return]


def _decode(kind: Any, value: Any, where: str) -> Any:
    read = _reader(kind)
    try:
        return read(value, where)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ResultError(f"{where} of a stored result cannot be read ({error!r}). Run the command again.") from error


@cache
def _reader(kind: Any) -> Callable[[Any, str], Any]:
    """What reads a value of a type, from its JSON and the name of its place."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, where: value
    if origin in (Union, types.UnionType):
        if not _optional(args):
            return lambda value, where: value
        some = next(each for each in args if each is not type(None))
        return lambda value, where: None if value is None else _decode(some, value, where)
    if hasattr(kind, "from_json") and not (isinstance(kind, type) and issubclass(kind, Result)):
        return lambda value, where: kind.from_json(value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return lambda value, where: kind(
            **{
                name: _decode(hint, value[name], f"{where}.{name}")
                for name, hint, optional in hints
                if not optional or name in value
            }
        )
    if origin is tuple:
        return lambda value, where: tuple(
            _decode(each, part, where)
            for each, part in zip(args[:1] * len(value) if args[-1:] == (Ellipsis,) else args, value, strict=True)
        )
    if origin is list:
        return lambda value, where: [_decode(args[0], each, where) for each in value]
    if origin is dict:
        return lambda value, where: {name: _decode(args[1], each, f"{where}.{name}") for name, each in value.items()}
    return lambda value, where: _plain(kind, value)


def _plain(kind: Any, value: Any) -> Any:
    """A value without parts. Raises TypeError for one of another type."""
    if kind in (float, Fraction):
        return kind(value)
    fits = value in get_args(kind) if get_origin(kind) is Literal else not isinstance(kind, type)
    if fits or (isinstance(kind, type) and isinstance(value, kind)):
        return value
    raise TypeError(f"{str(value)[:80]!r} is no {getattr(kind, '__name__', kind)}")


def _optional(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and type(None) in args


def _hints(kind: type) -> list[tuple[str, Any, bool]]:
    """The fields of a dataclass with their types, and whether they may be left out."""
    hints = get_type_hints(kind)
    return [(f.name, hints[f.name], f.default is not MISSING or f.default_factory is not MISSING) for f in fields(kind)]
