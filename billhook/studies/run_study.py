"""A study as a run of the store: its folder, its lock and its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from billhook.core.events import EventListener
from billhook.core.results.json_form import PagedResult
from billhook.methods.export.checkpoint import check_target, publish, staging_folder
from billhook.runs.job import run_environment
from billhook.runs.prepare import load_teacher
from billhook.runs.recipe import Recipe
from billhook.runs.store import Store
from billhook.studies.trials import StudyContext

R = TypeVar("R", bound=PagedResult | dict[str, Any])

NO_FOLDER = "-"  # the out of a run that writes no files


def several(values: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return ((values,) if values else ()) if isinstance(values, str) else tuple(values)


@contextmanager
def open_study(
    kind: str, recipe: Recipe, store: Path, out: str | Path | None, watch: EventListener
) -> Iterator[tuple[StudyContext, Path]]:
    """A run of the store, the loaded teacher, and the folder that will hold page and table."""
    with open_run(kind, recipe, store, out) as (opened, run, folder):
        yield StudyContext(opened, run, load_teacher(recipe, watch), watch), folder


@contextmanager
def open_run(kind: str, recipe: Recipe, store: Path, out: str | Path | None) -> Iterator[tuple[Store, str, Path]]:
    """The store, a new run of it that is held, and the folder that will hold page and table.

    Whoever asks for the run stores its result.
    """
    with closing(Store(store)) as opened:
        where = str(out) if out is not None else str(Path("lab") / "{run}")
        run = opened.new_run(recipe.model_dump(), run_environment(recipe) | {"laboratory": kind}, where)
        folder = Path(opened.run(run).out)
        if where != NO_FOLDER:
            check_target(folder, None)
        with opened.lock_and_track(run):
            yield opened, run, folder
            result = opened.run(run).result
            assert result is not None, "every kind of run stores the whole of its result"
            opened.update(run, state="done", result={"laboratory": kind, **result})


def write_study(result: R, folder: Path, page: Callable[[R], str], store: Store, run: str) -> R:
    """Write a result and its page, whole or not at all, and store it; the result with the place of the page."""
    where = str(folder / "index.html")
    if isinstance(result, PagedResult):
        result = replace(result, page=where)
        told = result.to_json()
    else:
        told = result | {"page": where}
        result = told  # type: ignore[assignment]
    aside = staging_folder(folder, "laboratory")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "result.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (aside / "index.html").write_text(page(result), encoding="utf-8")
    publish(aside, folder)
    store.update(run, result=told)
    return result
