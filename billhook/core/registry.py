"""How methods are found: one decorator, one look-up with the nearest name, and entry points of other packages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from billhook.core.errors import UnknownName, UsageError, nearest

F = TypeVar("F", bound=Callable[..., object])

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """One entry of a registry: what its docstring says, and its `options` with their defaults."""

    family: str
    name: str
    summary: str
    text: str
    formula: str
    cost: str
    source: str
    deviation: str
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON."""
        return asdict(self)


class Registry(Generic[F]):
    """Functions of one family under their own names.

    `family`: what messages call it. `group`: the entry-point group by which other packages add theirs, `billhook.` and
    a name without spaces; the value of an entry is the function itself.
    """

    def __init__(self, family: str, group: str = "") -> None:
        self.family = family
        self.group = f"billhook.{group or family}"
        if not re.fullmatch(r"billhook\.[a-z_]+", self.group):
            raise ValueError(f"{self.group!r} is no entry-point group. Use small letters and _ only.")
        self._entries: dict[str, F] = {}

    def add(self, function: F) -> F:
        """Add `function` under its own name."""
        name = function.__name__
        if self._entries.setdefault(name, function) is not function:
            raise ValueError(f"Two of the {self.family} are called {name!r}. Rename one of them.")
        return function

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._load_entry_points()
        return name in self._entries

    def __getitem__(self, name: str) -> F:
        if name not in self._entries:
            self._load_entry_points()
        if name not in self._entries:
            raise UnknownName(self.family, name, self._entries, " `billhook methods` describes them.")
        return self._entries[name]

    def get(self, name: str) -> F | None:
        """Return the entry `name`, or None if there is none."""
        return self._entries[name] if name in self else None

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def describe(self) -> list[MethodInfo]:
        """Return what the docstring and the signature of every entry say: see `parse_docstring`."""
        return [MethodInfo(self.family, name, **parse_docstring(self[name])) for name in self]

    def _load_entry_points(self) -> None:
        for entry in entry_points(group=self.group):
            if entry.name not in self._entries:
                self._entries[entry.name] = entry.load()


class RegistryWithFacts(Registry[F], Generic[F, V]):
    """A registry whose decorator also states facts of the entry, which others read by its name.

    `unstated`: the facts of an entry that states none.
    """

    def __init__(self, family: str, group: str = "", *, unstated: V) -> None:
        super().__init__(family, group)
        self._unstated = unstated
        self._facts: dict[F, V] = {}

    def add_with(self, facts: V) -> Callable[[F], F]:
        """Return the decorator that adds a function under its own name, with these facts."""

        def add(function: F) -> F:
            self._facts[function] = facts
            return self.add(function)

        return add

    def facts(self, name: str) -> V:
        """Return what the entry `name` states. Raises UnknownName."""
        return self._facts.get(self[name], self._unstated)


def options(function: Callable[..., object]) -> dict[str, Any]:
    """The options of a method with their defaults: its keyword-only parameters of plain kinds."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: default for name, default in named.items() if isinstance(default, bool | int | float | str)}


def resolve_options(given: dict[str, Any], *functions: Callable[..., object]) -> list[dict[str, Any]]:
    """For each method those of the `given` options that it takes, as values of its own kinds.

    `rank` is of every method that has such an option, `lora.rank` of one. Raises UsageError for an option that none of
    them takes, with the nearest one, or for a value of another kind.
    """
    known = [options(function) for function in functions]
    every = {name: default for of_one in known for name, default in of_one.items()}
    for function, of_one in zip(functions, known, strict=True):
        every |= {f"{function.__name__}.{name}": default for name, default in of_one.items()}
    for name in given:
        if name not in every:
            near = nearest(name, every)
            guess = f" Did you mean {near}?" if near else ""
            names = " and ".join(function.__name__ for function in functions)
            known_names = ", ".join(sorted(name for name in every if "." not in name)) or "none"
            raise UsageError(f"There is no option {name!r} of {names}.{guess} Known: {known_names}.")
    found = []
    for function, of_one in zip(functions, known, strict=True):
        mine = {name: given.get(f"{function.__name__}.{name}", given.get(name)) for name in of_one}
        found.append({n: _value(n, value, of_one[n]) for n, value in mine.items() if value is not None})
    return found


def _value(name: str, value: Any, default: Any) -> Any:
    """`value`, typed or read from a file, as a value of the kind of `default`."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif isinstance(default, int) and re.fullmatch(r"-?\d+", str(value)):
        return int(value)
    elif isinstance(default, float):
        with suppress(ValueError):
            return float(value)
    elif isinstance(default, str):
        return str(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
    raise UsageError(f"The option {name} is {kind}, not {value!r}. Its default is {default}.")


def parse_docstring(function: Callable[..., object]) -> dict[str, Any]:
    """What a docstring tells: `summary`, its first line; `text`; and what stands behind Formula:, Cost:, Source: and
    Deviation: or Deviations:. Besides, the `options` with their defaults."""
    lines = (inspect.getdoc(function) or "").split("\n", 1)
    pieces = re.split(r"(?:^|\s)(Formula|Cost|Source|Deviations?):\s", lines[1] if len(lines) > 1 else "")
    found = {"text": pieces[0], "Formula": "", "Cost": "", "Source": "", "Deviation": ""}
    found |= {mark.removesuffix("s"): piece for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True)}
    flat = {mark.lower(): " ".join(piece.split()) for mark, piece in found.items()}
    return {"summary": lines[0], **flat, "options": options(function)}


def source_line(function: Callable[..., object]) -> str:
    """What a docstring gives under `Source:`, on one line."""
    return str(parse_docstring(function)["source"])
