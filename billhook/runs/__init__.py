"""One run: its recipe, its store, its stages.

Here is what needs no torch: a look at the inputs of a recipe, and at what a store holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.core.errors import DataError, UnknownName, UsageError, option
from billhook.core.plan import shorten
from billhook.core.plan_files import find_path, require_plan
from billhook.core.results.stored import Run, RunSummary, StoredRun

if TYPE_CHECKING:
    from billhook.runs.recipe import TextOptions

Named = str | Path | None
STORE = "billhook.db"
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
    options: TextOptions, *, metrics: Iterable[str] = (), tasks: Iterable[str] = (), **written: Named
) -> None:
    """Raise where it is seen without torch and without the model that options name what is not there.

    Texts and the extras that they need, files of tasks and of a plan, methods, and the spelling of the device.
    `written`: options that name what will be written, by name.
    """
    from billhook.data.texts import require_sources
    from billhook.runs.recipe import Recipe

    for name in ("data", "eval_data", "recover_data"):
        if (source := getattr(options, name, None)) is not None:
            require_sources(source)
    for name, path in written.items():
        _require_name(name, path)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", options.device):
        raise UsageError(f"This machine has no device {options.device!r}. Write auto, cpu, cuda, cuda:1 or mps.")
    loss, _, task = getattr(options, "loss", "").partition(":")
    files = [task, *(each for each in tasks if not each.startswith("lmeval:"))]
    named = {"metric": list(metrics), "loss": [loss]}
    if isinstance(options, Recipe):
        if options.plan is not None:
            require_plan(options.plan)
        files.append(options.margin.file or "" if options.margin is not None else "")
        named["metric"] += [options.metric] if options.metric else []
        named |= {"search": [options.search], "recovery": [*options.recoveries], "export": [options.writes]}
    for file in filter(None, files):
        if find_path(file) is None:
            raise DataError(f"The task file {shorten(file, 200)} is missing. Give a .jsonl or .jsonl.gz file.")
    for family, names in named.items():
        _require_methods(family, filter(None, names))


def _require_name(name: str, path: Named) -> None:
    """Raise UsageError for what no file can be called."""
    try:
        if path is not None:
            Path(path).lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        kind = "folder" if name == "out" else "file"
        typed = option(name, shorten(str(path), 200))
        raise UsageError(f"{typed} cannot be written ({reason}). Choose another {kind}.") from error


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


# -- what a store holds ---------------------------------------------------------------------------------------------


def list_runs(store: str | Path = STORE) -> list[RunSummary]:
    """The runs of a store, the newest first. `pandas.DataFrame` takes the list."""
    from billhook.runs.store import Store  # this package is imported with every recipe

    with closing(Store(Path(store), read_only=True)) as opened:
        return [_summary(run, opened.count_losses(run.id)) for run in opened.runs()]


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
