"""What a command about the future is asked about, found in a store: a run, a model, the user's machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from billhook.core.anatomy import Anatomy
from billhook.core.errors import RunError, UsageError, either, option
from billhook.core.files.store_tables import connect_to_read
from billhook.core.outlook.history import History, history_of
from billhook.core.outlook.machines import Machine, machine
from billhook.core.outlook.roofline import Workload
from billhook.core.outlook.search_end import TRACED, SearchForecast, SearchTrace, search_end, trace_of
from billhook.core.plan_files import find_path
from billhook.core.results.json_form import JsonObject, decode
from billhook.core.results.outlook import MachineReport
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run
from billhook.runs import RUN_ID
from billhook.runs.store import Store

USUAL = ("l4", "rtx-4090", "m4", "desktop-ddr5", "raspberry-pi-5")  # machines that are shown where none is named
MOST_SEARCHES = 30  # earlier ones whose events are read


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked about: a `run`, or a model (`run` is None), with what the store knows of it, and all its `runs`.

    These and the runs of the history are brief: `Store.runs` says what their results lack.
    """

    run: Run | None
    history: History
    runs: tuple[Run, ...]


@contextmanager
def reading_store(store: str | Path) -> Iterator[Store | None]:
    """A store to read; None where there is no such file."""
    found = find_path(Path(store))
    if found is None:
        yield None
        return
    with closing(Store(found, read_only=True)) as opened:
        yield opened


def subject_of(of: str, store: Store | None) -> Subject:
    """The run of an id, or a model by name with its runs; "": the newest pruning, or the demo where there is none.

    Raises RunError for an id that the store does not hold.
    """
    runs = () if store is None else tuple(store.runs(brief=True))
    if of and RUN_ID.fullmatch(of) and find_path(of) is None:
        if store is None:
            raise RunError(f"There is no store that holds run {of}. Give its file: {option('store', 'FILE')}.")
        run = store.run(of)
        return Subject(run, _history(store, runs, run.fingerprints.get("model", "")), runs)
    if not of and store is not None:
        newest = next((run for run in runs if run.kind == PRUNE and run.fingerprints.get("model")), None)
        if newest is not None:
            return Subject(store.run(newest.id), _history(store, runs, newest.fingerprints["model"]), runs)
    name = of or "demo"
    same = (run.fingerprints.get("model") for run in runs if run.spec.get("model") == name)
    fingerprint = next((each for each in same if each), "")
    if store is None or not fingerprint:
        return Subject(None, History(name, "", None, (), ()), runs)
    return Subject(None, _history(store, runs, fingerprint), runs)


def _history(store: Store, runs: Sequence[Run], fingerprint: str) -> History:
    """What brief runs say of a model, with the anatomy that its newest pruning tells."""
    history = history_of(runs, fingerprint)
    pruned = (run for run in history.runs if run.kind == PRUNE and not (run.result or {}).get("vocabulary"))
    done = (run for run in pruned if (run.result or {}).get("schema") is not None)
    if history.anatomy is not None or (newest := next(done, None)) is None:
        return history
    return replace(history, anatomy=decode(Anatomy, (store.run(newest.id).result or {})["anatomy"]))


def require_pruned(subject: Subject) -> JsonObject:
    """The result of a pruning that is done. Raises RunError where the subject is none."""
    run = subject.run
    if run is None:
        look = either("billhook.list_runs()", "billhook runs")
        raise RunError(f"{subject.history.model} was not pruned in this store. `{look}` lists its runs.")
    if run.kind != PRUNE or run.result is None or run.result.get("schema") is None:
        raise RunError(f"Run {run.id} is {run.kind}, {run.state}. Name a pruning that is done: `billhook runs`.")
    return run.result


def anatomy_of(history: History, model: str) -> Anatomy:
    """The anatomy of a model, from the store, or read from its folder (which needs torch)."""
    if history.anatomy is not None:
        return history.anatomy
    from billhook.models.load import as_teacher

    return as_teacher(model).anatomy


def traces_of(store: Store, runs: Iterable[Run], search: object) -> list[SearchTrace]:
    """How the newest searches of a kind went, the oldest first."""
    found: list[SearchTrace] = []
    for run in runs:
        if run.kind == PRUNE and run.spec.get("search") == search and len(found) < MOST_SEARCHES:
            trace = trace_of(run.spec, run.fingerprints.get("model", ""), store.events(run.id, *TRACED))
            found += [trace] if trace is not None and trace.seconds else []
    return found[::-1]


def search_forecast(store: Store, run: Run, earlier: Callable[[], Iterable[SearchTrace]]) -> SearchForecast | None:
    """When the search of a run will end, and at which loss; None where it does not go on, or has hardly begun.

    `earlier`: gives how other searches went, and is asked only where the search goes on.
    """
    now = trace_of(run.spec, run.fingerprints.get("model", ""), store.events(run.id, *TRACED))
    return None if now is None or now.seconds is not None else search_end(now, earlier())


def ended_searches(store: Store, search: str) -> list[SearchTrace]:
    """How the newest ended searches of a kind went, the oldest first."""
    with closing(connect_to_read(store.path.resolve())) as db:
        same = db.execute(
            "SELECT id FROM runs WHERE result IS NOT NULL AND json_extract(recipe, '$.search') = ? "
            f"ORDER BY created DESC LIMIT {MOST_SEARCHES}",
            (search,),
        ).fetchall()
    return traces_of(store, [store.run(run) for (run,) in same], search)


def measured_here(runs: Iterable[Run]) -> Machine | None:
    """The user's machine, as the newest measurement among runs says."""
    told = next((r.result for r in runs if r.kind == MachineReport.kind and r.result is not None), None)
    return None if told is None else MachineReport.from_json(told).machine


def chosen_machines(names: str | Sequence[str], here: Machine | None) -> list[Machine]:
    """Machines by name; where none is named the user's own, if it was measured, and some that are common."""
    listed = [names] if isinstance(names, str) else list(names)
    wanted = [part.strip() for name in listed for part in name.split(",") if part.strip()]
    if listed and any(listed) and not wanted:
        raise UsageError(f"{option('machine')} is empty. Write a name such as rtx-4090, or leave it out.")
    return [machine(name, here) for name in wanted or [*(["here"] if here else []), *USUAL]]


def workload_of(context: int, batch: int, prompt_tokens: int, bits: float | None) -> Workload:
    """What a machine serves. Raises UsageError for numbers below 1, and for bits of a weight that no format has."""
    for name, value in (("context", context), ("batch", batch), ("prompt_tokens", prompt_tokens)):
        if value < 1:
            raise UsageError(f"{option(name, value)} is below 1. Give a whole number from 1 on.")
    if bits is not None and not 1 <= bits <= 32:
        raise UsageError(f"{option('bits', bits)} is not between 1 and 32. Write 16, 8 or 4.5, or leave it out.")
    return Workload(context, batch, prompt_tokens, None if bits is None else bits / 8)
