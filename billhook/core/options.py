"""The options of public functions: as types for editors and mypy, and in the signatures that `help` shows."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

Settings = Mapping[str, bool | int | float | str] | Sequence[str]  # {"front": 0.4}, or ["front=0.4"]

Source = str | Path  # of text

Amount = str | float  # 25%, 3blocks …; 0.25: of the parameters

RankRule = Literal["energy", "loss"]  # what ranks of low-rank factors are chosen by

BasisRule = Literal["one", "boundary"]  # bases of a residual stream: one of all boundaries, or one of each


class LoadOptions(TypedDict, total=False):
    """How a model is loaded."""

    memory: str | None
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    trust_remote_code: bool


class CompareOptions(LoadOptions, total=False):
    """How models are loaded, and how their held-out text is read."""

    field: str
    eval_tokens: int
    eval_length: int
    seed: int


class TaskOptions(CompareOptions, total=False):
    """As for a comparison; `set`: options of the methods."""

    set: Settings


class EvaluateOptions(TaskOptions, total=False):
    """Which text a model is evaluated on."""

    data: Source
    eval_data: Source | None


class ScoreOptions(LoadOptions, total=False):
    """Which text sites are scored on, and by which loss."""

    loss: str
    data: Source
    eval_data: Source | None
    field: str
    tokens: int
    length: int
    self_share: float
    seed: int


class SearchOptions(TaskOptions, total=False):
    """How a plan is searched, and what may be repaired; not how much is removed, nor on which texts."""

    about: str
    search: str
    loss: str
    uniform: bool
    multiple: int
    fast: bool
    shortlist: int
    risk: float
    finalists: int
    audit: bool
    protect: str
    batch: int
    context: int
    self_share: float
    length: int
    recover: str
    fold_in_search: bool
    recover_set: Settings
    recover_data: Source | None
    recover_tokens: int
    recover_length: int
    stock: bool
    export: str
    target: str
    workers: int | str


class StabilityOptions(SearchOptions, total=False):
    """How much is removed, and on which text; the metric and the tokens are what is compared."""

    remove: Amount | Sequence[Amount] | None
    data: Source


class SweepOptions(SearchOptions, total=False):
    """What overrules every recipe of a sweep, which says itself how much is removed and on which texts."""

    metric: str | None
    tokens: int


class StudyOptions(SweepOptions, total=False):
    """How much is removed, and on which texts."""

    remove: Amount | Sequence[Amount] | None
    data: Source
    eval_data: Source | None


class PruneOptions(StudyOptions, total=False):
    """All fields of a recipe but the model."""

    plan: str | Path | None
    within: str | None
    proof: Literal["full", "loss"]
    skills: str


class RequestFields(TypedDict, total=False):
    """How two servers are asked."""

    kind: Literal["chat", "text"]
    max_tokens: int
    temperature: float
    timeout: float
    retries: int
    concurrency: int
    seed: int


class WatchOptions(LoadOptions, total=False):
    """How a folder is loaded, and how a server is asked, for a watch."""

    timeout: float
    retries: int
    concurrency: int


class BaselineOptions(CompareOptions, total=False):
    """How a model is measured, and how a server is asked, for a baseline."""

    timeout: float
    retries: int
    concurrency: int


F = TypeVar("F", bound=Callable[..., Any])


def shows_options(kind: Any, fields: Mapping[str, Any], *, unset: bool = False) -> Callable[[F], F]:
    """Show the options of a function, a TypedDict that it takes by `**`, in its signature and its docstring.

    Arguments:
        kind: the TypedDict.
        fields: what holds the `default` and, if there is one, the `description` of each option by name.
        unset: an option that is left out has no default of its own; the signature shows `...`.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        lines = []
        for name, hint in get_type_hints(kind).items():
            default = ... if unset else fields[name].default
            own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
            if text := getattr(fields[name], "description", None):
                lines.append(f"{name}: {_in_python(text)}")
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        if lines:
            told = inspect.cleandoc(function.__doc__ or "")
            function.__doc__ = f"{told}\n\nOptions:\n{textwrap.indent(chr(10).join(lines), '    ')}\n"
        return function

    return decorate


def _in_python(text: str) -> str:
    """A help text with names of options in place of flags."""
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: f"`{flag[1].replace('-', '_')}`", text)
