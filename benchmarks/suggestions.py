"""What suggestions bring: of three starting runs the three best are run, and shown beside what was expected.

    python benchmarks/suggestions.py [MODEL] [--data TEXT] [--folder FOLDER] [--tokens N] [--remove SIZE] [--best N]

The folder keeps the store and the students, so that an interrupted run goes on. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import billhook
from billhook.core.outlook.suggestions import Found, Gain
from billhook.core.results.suggestions import Suggestion
from billhook.report.numbers import format_duration, format_nats

STARTS: dict[str, dict[str, object]] = {
    "one ranking": {"search": "oneshot", "metric": "cosine"}, "greedy": {"search": "greedy", "fast": True},
    "joint, no refit": {"search": "joint", "metric": "taylor_mix", "fast": True,
                        "set": {"levels": "3", "rounds": "1", "start": "none", "tokens": "128"}},
}  # fmt: skip
PRUNED_ONLY = "prune"  # the command whose outcome a store can compare


def started(store: Path, folder: Path, model: str, asked: dict[str, object]) -> dict[str, str]:
    """The run of each start, which is pruned unless the store holds it."""
    found = {}
    for name, recipe in STARTS.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        known = billhook.list_runs(store) if store.exists() else []
        done = next((run.run for run in known if run.out == str(out) and run.state == "done"), None)
        options = {**asked, **recipe}
        found[name] = done or billhook.prune(model, out=out, store=store, **options).run  # type: ignore[arg-type]
    return found


def tried(suggestion: Suggestion, store: Path, out: Path) -> None:
    """Type the command of a suggestion."""
    command = [sys.executable, "-m", *suggestion.command, "--store", str(store), "--out", str(out), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cell(told: Gain | Found | None) -> str:
    """Nats with their interval."""
    if told is None:
        return "–"
    return f"{format_nats(told.value)} ({format_nats(told.low)} to {format_nats(told.high)})"


def line(start: str, each: Suggestion) -> str:
    """A row of the table: expected beside found, in nats per token and in time."""
    seconds = ["–" if s is None else format_duration(s) for s in (each.seconds, each.found and each.found.seconds)]
    source = "no evidence" if each.gain is None else each.gain.source
    return f"| {start} | `{each.name}` | {cell(each.gain)} | {cell(each.found)} | {' | '.join(seconds)} | {source} |"


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model", nargs="?", default="demo")
    words.add_argument("--data", default="pydoc")
    words.add_argument("--folder", type=Path, default=Path("build/suggestions"))
    words.add_argument("--remove", default="10%")
    words.add_argument("--tokens", type=int, default=1024)
    words.add_argument("--length", type=int, default=128)
    words.add_argument("--eval-tokens", type=int, default=8192)
    words.add_argument("--best", type=int, default=3)
    given = words.parse_args()
    store = given.folder / "billhook.db"
    given.folder.mkdir(parents=True, exist_ok=True)
    asked: dict[str, object] = {
        "remove": given.remove, "data": given.data, "tokens": given.tokens, "length": given.length,
        "eval_tokens": given.eval_tokens, "self_share": 0.0,
    }  # fmt: skip
    runs = started(store, given.folder, given.model, asked)
    before = {}
    for start, run in runs.items():
        prunings = [s for s in billhook.suggest(run, store=store).suggestions if s.command[1] == PRUNED_ONLY]
        before[start] = prunings[: given.best]
    for start, suggestions in before.items():
        for each in suggestions:
            out = given.folder / f"{runs[start]}-{each.name}"
            if each.found is None and not out.exists():
                tried(each, store, out)
    print("| start | suggestion | expected nats | found nats | expected time | took | evidence |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for start, suggestions in before.items():
        after = {each.name: each for each in billhook.suggest(runs[start], store=store).suggestions}
        for each in suggestions:
            found = after[each.name].found if each.name in after else None
            told = Suggestion(each.name, each.what, each.command, each.gain, each.seconds, each.facts, found)
            print(line(start, told))


if __name__ == "__main__":
    main()
