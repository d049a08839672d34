"""Registries of methods: one decorator, one look-up with the nearest name, and entry points of other packages."""

from __future__ import annotations

import inspect
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from billhook.core.errors import UnknownName, UsageError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

F = TypeVar("F", bound=Callable[..., object])

OptionValues = dict[str, Any]  # of a method or a command, by name
T = TypeVar("T")
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
    options: OptionValues

    def to_json(self) -> OptionValues:
        """Every field as plain JSON."""
        return asdict(self)


class Entries(Generic[T]):
    """Values of one family by name, those of other packages included.

    `family`: its name in messages. `group`: the entry-point group `billhook.GROUP` of other packages, whose entries are
    the values. `fits`: whether a value is of the family.
    """

    def __init__(
        self,
        family: str,
        entries: Mapping[str, T] | None = None,
        *,
        group: str = "",
        fits: Callable[[object], bool] = callable,
    ) -> None:
        self.family = family
        self.group = f"billhook.{group or family}"
        if not re.fullmatch(r"billhook\.[a-z_]+", self.group):
            raise ValueError(f"{self.group!r} is not an entry-point group. Use small letters and _ only.")
        self._fits = fits
        self._searched: list[str] = []  # the import path on which entry points were last looked for
        self._entries: dict[str, T] = dict(entries or {})

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._load_entry_points()
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise UnknownName(self.family, name, self._entries, " `billhook methods` describes them.")
        return self._entries[name]

    def get(self, name: str) -> T | None:
        """Return the entry `name`, or None if there is none."""
        return self._entries[name] if name in self else None

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def _load_entry_points(self) -> None:
        if self._searched == sys.path:  # looking takes milliseconds, and this is asked for every loss
            return
        from importlib.metadata import entry_points  # what a mistake on the command line need not wait for

        for entry in entry_points(group=self.group):
            if entry.name not in self._entries:
                self._entries[entry.name] = self._loaded(entry)
        self._searched = list(sys.path)

    def _loaded(self, entry: EntryPoint) -> T:
        """Return the value of an entry point. Raises UsageError where its package is broken, and says which."""
        package = entry.dist.name if entry.dist is not None else entry.module
        told = f"The package {package} offers the {self.family} {entry.name} as {entry.value}, and"
        try:
            value: Any = entry.load()
        except Exception as error:  # code of others, which may fail in any way
            raise UsageError(
                f"{told} importing it failed ({type(error).__name__}: {error}). Repair it, or type: pip uninstall "
                f"{package}"
            ) from error
        if not self._fits(value):
            raise UsageError(f"{told} that is {value!r}, no {self.family}. Repair it, or type: pip uninstall {package}")
        return value  # type: ignore[no-any-return]


class Registry(Entries[F]):
    """Functions of one family under their own names."""

    def __init__(self, family: str, group: str = "") -> None:
        super().__init__(family, group=group)

    def add(self, function: F) -> F:
        """Add `function` under its own name."""
        name = function.__name__
        if self._entries.setdefault(name, function) is not function:
            raise ValueError(f"Two of the {self.family} are called {name!r}. Rename one of them.")
        return function

    def describe(self) -> list[MethodInfo]:
        """Return what the docstring and the signature of every entry say: see `parse_docstring`."""
        return [MethodInfo(self.family, name, **parse_docstring(self[name])) for name in self]


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


def options(function: Callable[..., object]) -> OptionValues:
    """Return the options of a method with their defaults: its keyword-only parameters of plain types."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: default for name, default in named.items() if isinstance(default, bool | int | float | str)}


def resolve_options(given: OptionValues, *functions: Callable[..., object]) -> list[OptionValues]:
    """Return for each function those of the `given` options that it takes, converted to its types.

    `rank` is an option of all functions that have it, `lora.rank` of one. Raises UsageError for an option that none of
    them has, with the nearest one, and for a value of another type.
    """
    known = [options(function) for function in functions]
    all_options = {name: default for of_one in known for name, default in of_one.items()}
    for function, of_one in zip(functions, known, strict=True):
        all_options |= {f"{function.__name__}.{name}": default for name, default in of_one.items()}
    for name in given:
        if name not in all_options:
            near = nearest(name, all_options)
            guess = f" Did you mean {near}?" if near else ""
            names = " and ".join(function.__name__ for function in functions)
            known_names = ", ".join(sorted(name for name in all_options if "." not in name))
            allowed = f"Known: {known_names}." if known_names else "It has none: leave it out."
            raise UsageError(f"There is no option {name!r} of {names}.{guess} {allowed}")
    resolved = []
    for function, of_one in zip(functions, known, strict=True):
        values = {name: given.get(f"{function.__name__}.{name}", given.get(name)) for name in of_one}
        resolved.append({n: _value(n, value, of_one[n]) for n, value in values.items() if value is not None})
    return resolved


def _value(name: str, value: Any, default: Any) -> Any:
    """Convert `value` to the type of `default`."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif isinstance(default, int) and re.fullmatch(r"-?[0-9]{1,9}", str(value)):
        return int(value)
    elif isinstance(default, float):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    elif isinstance(default, str):
        return str(value)
    kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
    raise UsageError(f"The option {name} is {kind}, not {reprlib.repr(value)}. Its default is {default}.")


def split_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def wrong_return(family: str, name: str, wanted: str, got: object) -> UsageError:
    """Return the error for a method, most likely of another package, that does not return what its family does."""
    kind = type(got).__name__ if not isinstance(got, str) else got
    return UsageError(
        f"The {family} {name} must return {wanted}, not {kind}. docs/guides/add-a-method.md says what each family "
        "returns."
    )


def parse_docstring(function: Callable[..., object]) -> OptionValues:
    """Return a docstring's `summary`, `text`, `formula`, `cost`, `source` and `deviation`, and the `options`."""
    lines = (inspect.getdoc(function) or "").split("\n", 1)
    pieces = re.split(r"(?:^|\s)(Formula|Cost|Source|Deviations?):\s", lines[1] if len(lines) > 1 else "")
    parts = {"text": pieces[0], "Formula": "", "Cost": "", "Source": "", "Deviation": ""}
    parts |= {mark.removesuffix("s"): piece for mark, piece in zip(pieces[1::2], pieces[2::2], strict=True)}
    flat = {mark.lower(): " ".join(piece.split()) for mark, piece in parts.items()}
    return {"summary": lines[0], **flat, "options": options(function)}


def source_line(function: Callable[..., object]) -> str:
    """Return the `Source:` of a docstring, on one line."""
    return str(parse_docstring(function)["source"])
