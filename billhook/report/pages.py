"""The page of each kind of result: one function under `@page`, in any module of this package."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import billhook.report
from billhook.core.errors import RunError
from billhook.core.results.json_form import Result

R = TypeVar("R", bound=Result)

PAGES: dict[str, Callable[[Any], str]] = {}  # by the kind of a result


def page(result: type[R]) -> Callable[[Callable[[R], str]], Callable[[R], str]]:
    """Register a function as the page of a class of results: it returns one self-contained HTML page."""

    def register(function: Callable[[R], str]) -> Callable[[R], str]:
        if PAGES.setdefault(result.kind, function) is not function:
            raise ValueError(f"Results of kind {result.kind!r} have two pages. Remove one of them.")
        return function

    return register


def page_of(kind: str) -> Callable[[Any], str]:
    """The page of a kind of result. Raises RunError for one without a page."""
    for module in pkgutil.walk_packages(billhook.report.__path__, "billhook.report."):
        import_module(module.name)
    if kind not in PAGES:
        raise RunError(f"A run of kind {kind} has no page. Kinds with a page: {', '.join(sorted(PAGES))}.")
    return PAGES[kind]
