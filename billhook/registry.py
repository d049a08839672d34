"""How methods are found: one decorator, one look-up with the nearest name, and entry points of other packages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from billhook.errors import UnknownName

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions of one family under their own names. Other packages add theirs by the entry point
    `billhook.<family>`, whose value is the function itself."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._entries: dict[str, F] = {}

    def add(self, function: F) -> F:
        """File `function` under its own name."""
        name = function.__name__
        if self._entries.setdefault(name, function) is not function:
            raise ValueError(f"Two of the {self.family} are called {name!r}. Rename one of them.")
        return function

    def __getitem__(self, name: str) -> F:
        if name not in self._entries:
            self._load_entry_points()
        if name not in self._entries:
            raise UnknownName(self.family, name, self._entries, " `billhook methods` describes them.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def describe(self) -> list[dict[str, str]]:
        """One row an entry: family, name, what it does (first line of its docstring), source."""
        return [
            {"family": self.family, "name": name, "summary": summary(self[name]), "source": source(self[name])}
            for name in self
        ]

    def _load_entry_points(self) -> None:
        for entry in entry_points(group=f"billhook.{self.family}"):
            if entry.name not in self._entries:
                self._entries[entry.name] = entry.load()


def summary(function: Callable[..., object]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").split("\n", 1)[0]


def source(function: Callable[..., object]) -> str:
    """What a docstring gives under `Source:`, on one line."""
    text = inspect.getdoc(function) or ""
    return " ".join(text.split("Source:", 1)[1].split()) if "Source:" in text else ""
