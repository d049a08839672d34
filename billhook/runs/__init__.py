"""One run: its recipe, its store, its stages.

Here is what needs no torch: a look at the inputs of a recipe, and at what a store holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billhook.core.devices.names import parse_devices
from billhook.core.errors import DataError, RunError, UnknownName, UsageError, nearest, option
from billhook.core.plan import shorten
from billhook.core.plan_files import find_path, require_plan
from billhook.core.registry import split_names
from billhook.core.results.stored import Run, RunSummary, StoredRun

if TYPE_CHECKING:
    from billhook.core.results.comparisons import Baseline
    from billhook.runs.recipe import TextOptions
    from billhook.runs.store import Store

Named = str | Path | None
STORE = "billhook.db"
RUN_ID = re.compile("r[0-9a-f]{6}")  # studies take runs for models
GROUPS = {"item_loss": "billhook.task_loss"}
WRITTEN = {  # where the methods of a family stand, and the decorators under which they do
    "metric": ("methods/metrics", ("metric", "group_metric")),
    "loss": ("engine/losses.py", ("loss", "item_loss")),
    "search": ("methods/search", ("search",)),
    "recovery": ("methods/recover", ("recovery",)),
    "export": ("methods/export", ("export",)),
}


# -- what a recipe names --------------------------------------------------------------------------------------------


def check_inputs(
    options: TextOptions, *, metrics: Iterable[str] = (), tasks: Iterable[str] = (), store: Named = None
) -> None:
    """Raise where it is seen without torch and without the model that options name what is not there.

    Texts and the extras that they and workers need, files of tasks and of a plan, methods, the spelling of the device,
    and the name of the store.
    """
    from billhook.data.skills import TASK as SKILL
    from billhook.data.skills import with_skills
    from billhook.data.texts import require_sources
    from billhook.engine.workers.crew import parse_workers, require_installed, require_one_device
    from billhook.runs.recipe import Recipe
    from billhook.runs.vocabulary import require_text

    for name in ("data", "eval_data", "recover_data"):
        if (source := getattr(options, name, None)) is not None:
            require_sources(source)
    if store is not None:
        _require_name(store)
    devices = parse_devices(options.device)
    loss, _, task = getattr(options, "loss", "").partition(":")
    files = [task, *(each for each in with_skills(tasks) if not each.startswith(("lmeval:", SKILL)))]
    named = {"metric": list(metrics), "loss": [loss]}
    if isinstance(options, Recipe):
        require_text(options)
        crew = parse_workers(options.workers)
        require_installed(crew)
        require_one_device(crew, devices)
        if options.plan is not None:
            require_plan(options.plan)
        files.append(options.margin.file or "" if options.margin is not None else "")
        named["metric"] += [options.metric] if options.metric else []
        named |= {
            "search": [options.search],
            "recovery": [*options.recoveries],
            "export": [*split_names(options.export)],
        }
    for file in filter(None, files):
        if find_path(file) is None:
            raise DataError(f"The task file {shorten(file, 200)} is missing. Give a .jsonl or .jsonl.gz file.")
    for family, names in named.items():
        _require_methods(family, filter(None, names))


def _require_name(store: str | Path) -> None:
    """Raise UsageError for a store that no file can be called."""
    try:
        Path(store).lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        typed = option("store", shorten(str(store), 200))
        raise UsageError(f"{typed} cannot be written ({reason}). Choose another file.") from error


def _require_methods(family: str, names: Iterable[str]) -> None:
    """Raise UnknownName for a method that is neither written here nor offered by a package. Once the methods are
    imported, their registry knows more."""
    module = WRITTEN[family][0].removesuffix(".py").replace("/", ".")
    if f"billhook.{module}" in sys.modules:
        return
    known = method_names(family)
    if (wrong := next((name for name in names if name not in known), None)) is not None:
        raise UnknownName(family, wrong, known, " `billhook methods` describes them.")


def method_names(family: str) -> set[str]:
    """The names of the methods of a family, from their files and from the entry points of other packages."""
    from importlib.metadata import entry_points

    place, decorators = WRITTEN[family]
    folder = Path(__file__).parents[1] / place
    texts = [file.read_text(encoding="utf-8") for file in (folder.glob("*.py") if folder.is_dir() else (folder,))]
    pattern = re.compile(rf"^@(?:{'|'.join(decorators)})(?:\(.*\))?\ndef (\w+)", re.MULTILINE)
    groups = [GROUPS.get(each, f"billhook.{each}") for each in decorators]
    offered = {entry.name for group in groups for entry in entry_points(group=group)}
    return offered | {name for text in texts for name in pattern.findall(text)}


def require_model(name: str, store: Named = None, *, baseline: bool = False, served: bool = False) -> None:
    """Raise where a name is neither a model's nor, with a `store`, that of a run of it.

    `baseline`: it may also be that of a stored baseline; `served`: ENGINE:FILE, of a model in its runtime. Raises
    RunError, UsageError, or as `find_source` and `find_artefact`.
    """
    from billhook.models import find_source
    from billhook.runs.store import Store
    from billhook.runtimes.artefacts import find_artefact, is_served, require_checkpoint

    held = find_path(store) if store is not None and find_path(name) is None else None
    if held is not None and (baseline or RUN_ID.fullmatch(name)):
        with closing(Store(held, read_only=True)) as opened:
            if baseline and load_baseline(opened, name) is not None:
                return
            if RUN_ID.fullmatch(name):
                opened.run(name)
                return
    if not served:
        require_checkpoint(name)
    if is_served(name):
        find_artefact(name)
    else:
        find_source(name)


def load_baseline(store: Store, name: str) -> Baseline | None:
    """A stored baseline; None if the name is a model's. Raises UsageError for a name that is nearly one's."""
    from billhook.core.files.cache_keys import BaselineKey
    from billhook.core.results.comparisons import Baseline
    from billhook.runtimes.artefacts import is_served

    known = store.lookup(BaselineKey("", name))
    if known is None and find_path(name) is None and "/" not in name and name != "demo" and not is_served(name):
        names = sorted(Baseline.from_stored(value).name for value in store.all_of(BaselineKey))
        if near := nearest(name, names):
            raise UsageError(f"There is no baseline {name!r}. Did you mean {near!r}? Stored: {', '.join(names)}.")
    return None if known is None else Baseline.from_stored(known)


# -- what a store holds ---------------------------------------------------------------------------------------------


def list_runs(store: str | Path = STORE) -> list[RunSummary]:
    """The runs of a store, the newest first. `pandas.DataFrame` takes the list."""
    from billhook.runs.store import Store  # this package is imported with every recipe

    with closing(Store(Path(store), read_only=True)) as opened:
        return [_summary(run, opened.count_losses(run.id)) for run in opened.runs(brief=True)]


TAG = re.compile(r"[^\s,]{1,40}")


def tag(run: str, tags: Iterable[str], *, remove: bool = False, store: str | Path = STORE) -> list[str]:
    """Put tags to a run, or `remove` them. Returns those that it has then.

    Raises UsageError for a tag with spaces, commas or nothing to see, and for one to remove that the run has not.
    """
    from billhook.core.errors import visible
    from billhook.runs.store import Store

    asked = list(tags)
    wrong = next((each for each in asked if not TAG.fullmatch(each) or visible(each) != each), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is not a tag. A tag is a word of at most 40 characters: billhook tag {run} good")
    with closing(Store(Path(store), read_only=True)) as opened:
        opened.run(run)
    with closing(Store(Path(store))) as opened:
        if remove and (wrong := next((each for each in asked if each not in opened.tags(run)), None)):
            has = ", ".join(opened.tags(run)) or "no tags"
            raise UsageError(f"Run {run} has no tag {wrong!r}. It has {has}.")
        opened.tag(run, asked, remove=remove)
        return opened.tags(run)


def _summary(run: Run, losses: int) -> RunSummary:
    """One run in a list. What a study or an evaluation of Billhook 0.1 was asked is not known, beyond its model."""
    from billhook.core.results.specs import PRUNE
    from billhook.core.results.stored import RunSummary

    asked = run.spec if run.kind == PRUNE else {}
    remove = asked.get("remove") or asked.get("plan") or asked.get("within")
    return RunSummary(
        *(
            run.id,
            run.kind,
            run.created,
            run.state,
            str(run.spec.get("model", "")),
            remove,
            asked.get("search"),
            run.out,
            losses,
        )
    )


def show(run: str, store: str | Path = STORE) -> StoredRun:
    """All that the store holds of one run: what it was asked, its state, its events and its result."""
    from billhook.core.results.stored import StoredRun, read_result
    from billhook.runs.store import Store

    with closing(Store(Path(store), read_only=True)) as opened:
        found = opened.run(run)
        events = tuple(opened.events(run))
        result = None if found.result is None else read_result(found.kind, found.result)
        about = {name: getattr(found, name) for name in found.__slots__ if name != "result"}
        return StoredRun(**about, losses=opened.count_losses(run), events=events, result=result)


def unfinished_run(store: Store, run: str | None = None) -> Run:
    """The pruning to resume, the newest unfinished one if none is named, with its paths as they are now.

    Raises RunError where there is none, or in another folder than the run's.
    """
    from billhook.core.results.specs import PRUNE

    chosen = store.run(run) if run else _newest_unfinished(store)
    if chosen.kind != PRUNE:
        raise RunError(f"Run {chosen.id} is no pruning. Begin it again: billhook {chosen.kind} …")
    if chosen.state == "done":
        raise RunError(
            f"Run {chosen.id} is done; its checkpoint is {chosen.out}. `billhook show {chosen.id}` tells more."
        )
    return _here(chosen, store.path)


def require_resumable(run: str | None, store: str | Path, out: Named) -> None:
    """Raise where there is no run to resume, or its result cannot be written at another folder `out`.

    Raises as `unfinished_run` and `check_target`.
    """
    from billhook.core.files.target_folder import check_target, named_folder
    from billhook.runs.store import Store

    with closing(Store(Path(store), read_only=True)) as opened:
        found = unfinished_run(opened, run)
    if out is not None and named_folder(out) != Path(found.out):
        check_target(named_folder(out))


def _newest_unfinished(store: Store) -> Run:
    from billhook.core.results.specs import PRUNE

    # A run that was refused before it had model and tokens has nothing to resume.
    prunings = [run for run in store.runs(brief=True) if run.kind == PRUNE]
    unfinished = [run for run in prunings if run.state != "done" and (run.fingerprints or run.state != "failed")]
    free = [run for run in unfinished if store.free(run.id)]
    if unfinished:
        return (free or unfinished)[0]  # one that another process holds is refused by name
    raise RunError(f"{store.path} holds no unfinished run. `billhook runs` lists what it holds.")


def _here(run: Run, store: Path) -> Run:
    """The run as its paths are now: they start from its folder, which may have been moved with the store.

    Raises RunError in another folder.
    """
    begun, here = Path(str(run.environment.get("folder", Path.cwd()))), Path.cwd()
    there = Path(str(run.environment.get("store", begun))).parent
    now = Path(os.path.normpath(store.resolve().parent / os.path.relpath(begun, there)))
    if here not in (begun, now):
        raise RunError(f"Run {run.id} was begun in another folder. Go there first: cd {shlex.quote(str(now))}")
    if here == begun:
        return run

    def moved(value: Any) -> Any:
        path = Path(value) if isinstance(value, str) else None
        return str(here / path.relative_to(begun)) if path is not None and path.is_relative_to(begun) else value

    return replace(run, spec={name: moved(value) for name, value in run.spec.items()}, out=moved(run.out))


# -- locks -----------------------------------------------------------------------------------------------------------

LOOKS, SECONDS_BETWEEN = 3, 0.05  # at a held file, which someone else may only look at


@contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Hold a file until the block ends, or the process does; then it is gone. Raises BlockingIOError if it is held."""
    for left in reversed(range(LOOKS)):
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    raise BlockingIOError("the file was just taken over")
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(SECONDS_BETWEEN)
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # while it is still locked: whoever opened it meanwhile sees it is gone
            return


def is_held(path: Path) -> bool:
    """Whether a process holds a file. Deletes what one that was killed left."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # in a folder of somebody else's
                path.unlink()
            return False
    except FileNotFoundError:
        return False
    except OSError:  # held, or not to be opened
        return True
