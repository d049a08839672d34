"""Every recipe on the demo model, calibrated on the same text: what docs/results.md shows.

    python benchmarks/methods.py --data DATA      # hours on two cores; begin again to go on
    python benchmarks/methods.py --data DATA --only 10%,draws

DATA holds text/c4_en.jsonl.gz, text/wikitext2_validation.jsonl.gz and tasks/*.jsonl.gz. After each part docs/results.md
is written anew, and what was found goes to benchmarks/measured/: plans, and the outcome of every text and item. Nothing
that stands there, or in the store in --work, is measured again, on whichever machine the benchmark goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from measured import put_back, written_down  # the files beside this one
from results import PARTS, page

import billhook
from billhook.core.events import Event
from billhook.core.results.studies import SweepResult
from billhook.methods.search import SEARCHES, narrows
from billhook.models.device import keep_freed_memory
from billhook.runs import prepare
from billhook.runs.recipe import BUILTIN, parse_recipe, read_yaml, recipe_names
from billhook.runs.store import Store
from billhook.studies import trials

TOKENS, LENGTH = 4096, 128
MEASURED = Path(__file__).parent / "measured"
TASKS = ("piqa_validation", "arc_easy_test", "winogrande_validation")
# What ten minutes a search allow on two cores; everything else is as published, but for the common calibration.
SCALED: dict[str, dict[str, Any]] = {
    "billhook-depth": {"fast": True},
    "finercut": {"fast": True, "shortlist": 6},
    "blockpruner": {"fast": True},
    "sleb": {"fast": True},
    "evopress": {"set": {"generations": 16, "offspring": 16, "tokens": 512}},
}
DEPTH = [n for n in recipe_names() if not narrows(read_yaml(BUILTIN / f"{n}.yaml").get("search", "swap"))]
PRUNINGS = [name for name in DEPTH if name == "sprint" or "recover" not in read_yaml(BUILTIN / f"{name}.yaml")]
FINALISTS = ("billhook-depth", "finercut", "evopress")


def main() -> None:
    """Run the parts that are asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    given = parser.parse_args()
    keep_freed_memory()
    given.work.mkdir(parents=True, exist_ok=True)
    texts = texts_of(given.data, given.work)
    parts = {"draws": draws, "calibration": calibration, "mixture": mixture, "regret": regret}
    put_back(given.work / "billhook.db", MEASURED)
    for part in given.only.split(","):
        start = time.perf_counter()
        try:
            parts[part](given, texts) if part in parts else table(given, texts, part)
        finally:
            written_down(given.work / "billhook.db", MEASURED)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        given.results.write_text(page(MEASURED, SCALED), encoding="utf-8")


def texts_of(data: Path, work: Path) -> dict[str, str]:
    """Texts and tasks by name: C4 as it is, WikiText-2 as whole articles, so that an article is one text."""
    articles: dict[str, list[str]] = {}
    with gzip.open(data / "text" / "wikitext2_validation.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            articles.setdefault(str(row["doc"]), []).append(row["text"])
    whole = work / "wikitext2.jsonl"
    whole.write_text("".join(json.dumps({"text": "\n\n".join(lines)}) + "\n" for lines in articles.values()))
    c4 = work / "c4.jsonl.gz"
    shutil.copyfile(data / "text" / "c4_en.jsonl.gz", c4)
    for name in TASKS:
        shutil.copyfile(data / "tasks" / f"{name}.jsonl.gz", work / f"{name}.jsonl.gz")
    return {"c4": str(c4), "wikitext2": str(whole)} | {name: str(work / f"{name}.jsonl.gz") for name in TASKS}


def recipe_files(work: Path, names: Sequence[str]) -> list[str]:
    """The recipes as they are run here: as published, but for `SCALED`."""
    folder = work / "recipes"
    folder.mkdir(exist_ok=True)
    for name in names:
        values = read_yaml(BUILTIN / f"{name}.yaml")
        for key, value in SCALED.get(name, {}).items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return [str(folder / f"{name}.yaml") for name in names]


def sweep(given: argparse.Namespace, part: str, recipes: Sequence[str], **options: Any) -> SweepResult:
    """One sweep into --work, through the store that all parts share."""
    shutil.rmtree(given.work / part, ignore_errors=True)
    common = {
        "tokens": TOKENS, "length": LENGTH, "eval_tokens": 16384, "eval_length": 512, "self_share": 0.0
    } | options  # fmt: skip
    return billhook.sweep(
        "demo", recipe_files(given.work, recipes), out=given.work / part, store=given.work / "billhook.db", watch=tell,
        **common,
    )  # fmt: skip


def tell(event: Event) -> None:
    """Only what begins."""
    if event.stage == "sweep" or event.done == event.total:
        print(
            f"{time.strftime('%H:%M:%S')} {event.stage} {event.done}/{event.total} {dict(event.values)}",
            file=sys.stderr,
        )


def table(given: argparse.Namespace, texts: dict[str, str], size: str) -> None:
    """All recipes at one size, two texts, three tasks."""
    told = sweep(
        given, size, PRUNINGS, remove=[size], data=[texts["c4"]], eval_data=[texts["c4"], texts["wikitext2"]],
        tasks=[texts[name] for name in TASKS],
    )  # fmt: skip
    file_result(size, told.to_json())


def draws(given: argparse.Namespace, texts: dict[str, str]) -> None:
    """The strongest recipes on other draws of the calibration text."""
    found = []
    for seed in (1, 2):
        both = [texts["c4"], texts["wikitext2"]]
        result = sweep(given, f"draw{seed}", FINALISTS, remove=["20%"], data=both[:1], eval_data=both, seed=seed)
        found.append({"seed": seed, "sweep": result.to_json()})
    file_result("draws", {"draws": found})


def calibration(given: argparse.Namespace, texts: dict[str, str]) -> None:
    """The default recipe on other calibration texts."""
    c4, wiki = texts["c4"], texts["wikitext2"]
    datas = [c4, wiki, "pydoc", "self", f"{c4}+self", f"{c4}+{wiki}"]
    told = sweep(given, "calibration", ["billhook-depth"], remove=["10%"], data=datas, eval_data=[c4, wiki])
    file_result("calibration", told.to_json())


def mixture(given: argparse.Namespace, texts: dict[str, str]) -> None:
    """The default recipe on a text alone, and with as much that the model writes, on several draws of both."""
    found = []
    both = [texts["c4"], texts["wikitext2"]]
    for seed in (0, 1, 2):
        datas = [texts["c4"], f"{texts['c4']}+self"]
        part = f"mixture{seed}"
        result = sweep(given, part, ["billhook-depth"], remove=["20%"], data=datas, eval_data=both, seed=seed)
        found.append({"seed": seed, "sweep": result.to_json()})
        file_result("mixture", {"draws": found})


def regret(given: argparse.Namespace, texts: dict[str, str]) -> None:
    """Every search against the optimum: 4 of the 16 sites of the middle blocks, 512 tokens, in nats per token."""
    searches: dict[str, dict[str, Any]] = {
        name: {"search": name} for name in SEARCHES if name != "contiguous" and not narrows(name)
    }
    searches |= {
        "oneshot by cosine": {"search": "oneshot", "metric": "cosine"},
        "solve without exchanges": {"search": "ilp", "set": {"polish": False}},
        "evolve from random plans": {"search": "evolve", "set": {"start": "random"}},
        "greedy, racing": {"search": "greedy", "fast": True},
    }
    common = {
        "model": "demo", "remove": "4sites", "protect": "0-10,19-29", "data": texts["c4"], "tokens": 512, "length": 64,
        "self_share": 0.0,
    }  # fmt: skip
    with closing(Store(given.work / "billhook.db")) as store:
        run = store.new_run("regret", parse_recipe(common).model_dump(), {}, str(given.work))
        bench = trials.StudyContext(store, run, billhook.load("demo"), tell)
        rows = []
        for number, (name, own) in enumerate(searches.items()):
            tell(Event("sweep", number, len(searches), {"search": name}))
            recipe = parse_recipe(common | own)
            trial = trials.run_trial(bench, name, recipe, tokens := trials.calibration_of(bench, recipe))
            loss = prepare.probe_of(recipe, bench.teacher, tokens, bench.job(recipe)).losses([trial.plan])[0].mean
            rows.append({"search": name, "loss": loss, "removed": trial.plan.names(), "seconds": trial.seconds,
                         "site_evaluations": trial.site_evaluations})  # fmt: skip
        store.update(run, state="done")
    best = min(row["loss"] for row in rows)
    file_result("regret", {"rows": [row | {"regret": row["loss"] - best} for row in rows]})


def file_result(part: str, told: dict[str, Any]) -> dict[str, Any]:
    """A part's result, where the page looks for it; itself."""
    MEASURED.mkdir(exist_ok=True)
    (MEASURED / f"{part.removesuffix('%')}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


if __name__ == "__main__":
    main()
