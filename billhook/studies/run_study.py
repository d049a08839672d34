"""A study as a run of the store: its folder, its lock and its files."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from billhook.core.errors import ResourceError, ResultError, RunError, cannot_write, either, option, writing
from billhook.core.events import EventListener
from billhook.core.files.target_folder import check_target, named_folder, publish, staging_folder
from billhook.core.results.json_form import PagedResult, Result
from billhook.core.results.specs import PRUNE, RunSpec
from billhook.core.results.stored import Run, read_result
from billhook.models.load import Teacher
from billhook.models.pruned_config import require_prunable
from billhook.report.pages import page_of
from billhook.runs import require_model
from billhook.runs.job import EvalContext, RunContext, run_environment, store_and_watch, with_team
from billhook.runs.pipeline import delete_unfinished
from billhook.runs.prepare import NOTHING, load_teacher
from billhook.runs.recipe import EvalOptions, Recipe
from billhook.runs.store import STORE, Store
from billhook.runs.vocabulary import refuse_vocabulary
from billhook.studies.trials import StudyContext

R = TypeVar("R", bound=Result)

NO_FOLDER = "-"  # the out of a run that writes no files

PAGE = "index.html"


def stored_run(run: str, store: str | Path) -> Run:
    """A run of a store, which is only read. Raises RunError with the nearest one."""
    with closing(Store(Path(store), read_only=True)) as opened:
        return opened.run(run)


def several(values: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return ((values,) if values else ()) if isinstance(values, str) else tuple(values)


@contextmanager
def open_study(
    spec: RunSpec,
    recipe: Recipe,
    store: Path,
    out: str | Path | None,
    watch: EventListener,
    *,
    loaded: Mapping[str, Teacher] = NOTHING,
) -> Iterator[tuple[StudyContext, Path]]:
    """A run of the store, the loaded teacher, and the folder that will hold page and table."""
    folder = None if out is None else named_folder(out)
    with open_run(spec, recipe, store, folder, watch, loaded=loaded) as job:
        teacher = load_teacher(recipe, job.watch, loaded)
        require_prunable(teacher.pruned, teacher.name)
        with with_team(RunContext(recipe, job.store, job.run, job.out, job.watch, {}), teacher) as shared:
            yield StudyContext(job.store, job.run, teacher, job.watch, recipe.workers, shared.team), job.out


@contextmanager
def open_run(
    spec: RunSpec,
    options: EvalOptions,
    store: Path,
    out: str | Path | None,
    watch: EventListener,
    *,
    loaded: Mapping[str, Teacher] = NOTHING,
) -> Iterator[EvalContext]:
    """A new run of the store that this process holds; `options` say how models and texts are read.

    `out`: the folder that will hold page and table, `NO_FOLDER`, or None for one of the run's own. The caller stores
    the result. Raises BudgetError for a recipe that cuts the vocabulary: a study compares models with the same tokens.
    """
    refuse_vocabulary(options)
    if out is not None and out != NO_FOLDER:
        check_target(named_folder(out))
    if options.model not in loaded:
        require_model(options.model, store, served=not isinstance(options, Recipe))
    where = str(out) if out == NO_FOLDER else str(named_folder(out if out is not None else Path("studies") / "{run}"))
    with begin_run(spec, options.device, store, where) as (opened, run):
        folder = Path(opened.run(run).out)
        if where != NO_FOLDER:
            check_target(folder, None)
        yield EvalContext(options, opened, run, folder, store_and_watch(opened, run, watch), {}, loaded)


@contextmanager
def begin_run(spec: RunSpec, device: str, store: Path, out: str) -> Iterator[tuple[Store, str]]:
    """The store, and a new run of it that this process holds, and that is done when the block ends."""
    with writing(), closing(Store(store)) as opened:
        delete_unfinished(opened)
        run = opened.new_run(spec.kind, spec.to_json(), run_environment(device, opened), out)
        with opened.lock_and_track(run):
            yield opened, run
            assert opened.run(run).result is not None, "every kind of run stores the whole of its result"
            try:
                opened.update(run, state="done")
            except sqlite3.Error as error:
                if not cannot_write(error):  # it has its result, and is known to be done
                    raise


def write_study(result: R, folder: Path, store: Store, run: str) -> R:
    """Store a result and write its page, whole or not at all; returns it with the place of the page.

    Raises ResourceError where the folder was taken meanwhile: then the page stays beside it.
    """
    if isinstance(result, PagedResult):
        result = replace(result, page=str(folder / PAGE))
    store.update(run, result=result.to_json())
    _write_page(result, folder, run)
    return result


def _write_page(result: Result, folder: Path, run: str) -> None:
    html, aside = page_of(result.kind)(result), staging_folder(folder, run)
    aside.mkdir(parents=True)
    try:
        (aside / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        (aside / PAGE).write_text(html, encoding="utf-8", errors="backslashreplace")
        publish(aside, folder)
    except OSError as error:
        if cannot_write(error):
            raise
        kept = folder.resolve().with_name(f"{folder.resolve().name}-{run}")
        aside.rename(kept)
        again = either(f"billhook.make_report({run!r}, out='FOLDER')", f"billhook report {run} --out FOLDER")
        raise ResourceError(
            f"{option('out', str(folder))} was taken while the run worked ({error.strerror}). The page is in {kept}. "
            f"Write it elsewhere: {again}"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_report(run: str, *, out: str | Path | None = None, store: str | Path = STORE) -> Path:
    """Make the page of a stored run again, with its result beside it as JSON, from the store alone.

    Arguments:
        run: the id of a run that is done.
        out: the folder to write, which must not hold anything (default: reports/<run>).

    Returns the page. Raises RunError for a run without a result or of a kind without a page, ResultError for a result
    that Billhook 0.1 stored.
    """
    stored = stored_run(run, store)
    page_of(stored.kind)
    again = "what the store holds is not measured again"
    if stored.result is None:
        resume = either(f"billhook.resume({run!r})", f"billhook prune --resume --run {run}")
        how = resume if stored.kind == PRUNE else f"run {stored.kind} again"
        raise RunError(f"Run {run} is {stored.state} and has no result. Finish it: {how}; {again}.")
    result = read_result(stored.kind, stored.result)
    if not isinstance(result, Result):
        look = either(f"billhook.show({run!r})", f"billhook show {run}")
        raise ResultError(
            f"Billhook 0.1 stored the result of run {run}, and this Billhook makes no page of it. Run the command "
            f"again ({again}), or read what the store says: {look}."
        )
    folder = named_folder(out if out is not None else Path("reports") / run)
    check_target(folder)
    if isinstance(result, PagedResult):
        result = replace(result, page=str(folder / PAGE))
    with writing():
        _write_page(result, folder, run)
    return folder / PAGE
