"""Every recovery on the demo model, 12 of 60 sites removed by the default recipe on C4: what docs/results.md shows.

    python benchmarks/recovery.py --data DATA                        # three hours on two cores
    python benchmarks/recovery.py --data DATA --only fold fold+mixed

DATA as for methods.py. `fold-in-search` holds a greedy search that judges plans after a fold against one that does not,
both folded afterwards. `+mixed` learns from C4 and WikiText-2 in equal parts, the others from C4; both keep every
second text for the proof. Trainings stop after --minutes. What was measured goes to benchmarks/measured/recovery.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured import put_back, written_down
from methods import LENGTH, MEASURED, SCALED, TASKS, TOKENS, file_result, texts_of  # the files beside this one
from results import page

import billhook
from billhook.core import statistics
from billhook.core.events import Event
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.data.token_sets import TokenSet
from billhook.methods.evaluate.multiple_choice import score_choices
from billhook.methods.recover import RECOVERIES, RecoveryTask, trains
from billhook.models.device import keep_freed_memory
from billhook.models.repair import NO_REPAIR, Repair
from billhook.runs.evaluation import Student, choice_logprobs, perplexity_results
from billhook.runs.job import RunContext
from billhook.runs.prepare import recovery_tokens
from billhook.runs.recipe import parse_recipe, with_overrides
from billhook.runs.recovery import learning_texts, recovery_options
from billhook.runs.store import Store
from billhook.studies import sweep, trials

FREE = ("mean", "scale", "lowrank", "linear", "fold", "fold+mixed")
IN_SEARCH = "fold-in-search"
TRAINED = ("bias", "partial", "lora", "full", "fold,partial", "fold,lora")


def main() -> None:
    """Recover, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--only", nargs="*", default=[*FREE, *TRAINED, IN_SEARCH])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    given = parser.parse_args()
    keep_freed_memory()
    given.work.mkdir(parents=True, exist_ok=True)
    texts = texts_of(given.data, given.work)
    database = given.work / "billhook.db"
    put_back(database, MEASURED)
    file = MEASURED / "recovery.json"
    told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    with closing(Store(database)) as store:
        common = {
            "model": "demo", "remove": "12sites", "data": texts["c4"], "tokens": TOKENS, "length": LENGTH,
            "self_share": 0.0,
        }  # fmt: skip
        recipe = parse_recipe(with_overrides("billhook-depth", **common, **SCALED["billhook-depth"]))
        run = store.new_run("recovery", recipe.model_dump(), {}, str(given.work))
        bench = trials.StudyContext(store, run, billhook.load("demo"), tell)
        trial = trials.run_trial(bench, "billhook-depth", recipe, trials.calibration_of(bench, recipe))
        grid = sweep.Grid(("billhook-depth",), ("12sites",), (texts["c4"],), (texts["c4"], texts["wikitext2"]),
                        tuple(texts[task] for task in TASKS[:2]))  # fmt: skip
        sets = sweep.evaluation_sets(bench, grid, recipe)
        told |= {
            "removed": trial.plan.names(),
            "evaluation": {name: asdict(each.info()) for name, each in sets.items()},
        }

        job = bench.job(recipe)
        if IN_SEARCH in given.only:
            few = common | {"tokens": TOKENS // 4, "recover_tokens": given.tokens}
            texts_only = {name: tokens for name, tokens in sets.items() if tokens.choices is None}
            told["in_search"] = in_search(bench, texts_only, few, given.work / "training")
            file_result("recovery", told)
        chains = [name for name in given.only if name != IN_SEARCH]
        sides = [(Plan(), NO_REPAIR), (trial.plan, NO_REPAIR)] if chains else []
        before = [results_of(job, bench, sets, side) for side in sides]
        for number, chain in enumerate(chains):
            names, _, mixed = chain.partition("+")
            data = f"{texts['c4']}+{texts['wikitext2']}" if mixed else texts["c4"]
            asked = recipe.model_copy(update={
                "recover": names, "recover_tokens": given.tokens, "recover_data": data,
                "recover_set": {"minutes": given.minutes, "epochs": 100} if set(names.split(",")) - set(FREE) else {},
            })  # fmt: skip
            tell(Event("recovery", number, len(chains), {"chain": chain}))
            start = time.perf_counter()
            repair, curve = recovered(bench.job(asked), bench, trial.plan, given.work / "training")
            seconds = time.perf_counter() - start
            told["rows"][chain] = row(*before, results_of(job, bench, sets, (trial.plan, repair)), seconds) | {
                "parameters": repair.parameters(), "tokens": given.tokens, "minutes": given.minutes, "curve": curve
            }  # fmt: skip
            file_result("recovery", told)
            given.results.write_text(page(MEASURED, SCALED), encoding="utf-8")
        store.update(run, state="done")
    written_down(database, MEASURED)


def in_search(
    bench: trials.StudyContext, sets: dict[str, TokenSet], common: dict[str, Any], work: Path
) -> dict[str, Any]:
    """What it changes that a search judges plans after a fold: both plans are folded, then compared."""
    found, told = [], {}
    for name, inside in {"after the search": False, "in the search too": True}.items():
        recipe = parse_recipe(common | {"search": "greedy", "fast": True, "recover": "fold", "fold_in_search": inside})
        trial = trials.run_trial(bench, "greedy", recipe, trials.calibration_of(bench, recipe))
        repair, _ = recovered(bench.job(recipe), bench, trial.plan, work)
        found.append(results_of(bench.job(recipe), bench, sets, (trial.plan, repair)))
        told[name] = {"removed": trial.plan.names(), "search_seconds": trial.seconds,
                      "parameters": bench.teacher.anatomy.total("parameters", trial.plan)}  # fmt: skip
    dense = results_of(bench.job(recipe), bench, sets, (Plan(), NO_REPAIR))
    return told | {"on": row(dense, *found, 0.0)["on"], "tokens": common["tokens"]}


def results_of(
    job: RunContext, bench: trials.StudyContext, sets: dict[str, TokenSet], side: Student
) -> dict[str, EvalResult]:
    """Perplexity on every text and accuracy on every task of one student; filed, so that no side is measured twice."""
    found = {}
    for name, tokens in sets.items():
        if tokens.choices is None:
            (found[name],) = perplexity_results(job, bench.teacher, [side], tokens)
        else:
            found[name] = score_choices(tokens, choice_logprobs(job, bench.teacher, [side], tokens)[0])["acc"]
    return found


def tell(event: Event) -> None:
    """What begins and ends."""
    if event.stage in ("recovery", "sweep") or event.done == event.total:
        print(
            f"{time.strftime('%H:%M:%S')} {event.stage} {event.done}/{event.total} {dict(event.values)}",
            file=sys.stderr,
        )


def recovered(
    job: RunContext, bench: trials.StudyContext, plan: Plan, work: Path
) -> tuple[Repair, list[tuple[float, float]]]:
    """The repair of a chain of recoveries, and the best validation loss over the seconds of its trainings."""
    repair, start = NO_REPAIR, time.perf_counter()
    curve: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        bench.watch(event)
        best = event.values.get("best")
        if isinstance(best, float) and (not curve or best < curve[-1][1]):
            curve.append((round(time.perf_counter() - start, 1), best))

    chosen = recovery_options(job.recipe)
    valid, fitted, trained = learning_texts(recovery_tokens(job.recipe, bench.teacher, job.watch), list(chosen))
    for name, options in chosen.items():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        subject = RecoveryTask(
            bench.teacher, plan, repair, None, job.recipe.seed, work, watch, bfloat16=job.recipe.dtype == "auto"
        )
        repair = RECOVERIES[name](subject, trained if trains(name) else fitted, valid, **options)
    return repair, curve


def row(
    dense: dict[str, EvalResult], bare: dict[str, EvalResult], after: dict[str, EvalResult], seconds: float
) -> dict[str, Any]:
    """What a recovery did on every text and task: before, after, the paired change, the share of the gap."""
    on = {}
    for name, result in after.items():
        change = statistics.paired_difference(bare[name], result)
        text = result.name == "perplexity"
        values = [statistics.exp_capped(each.mean) if text else each.mean for each in (dense[name], bare[name], result)]
        lost = values[1] - values[0]
        on[name] = {
            "kind": result.name, "tokens": result.tokens, "dense": values[0], "before": values[1], "after": values[2],
            "change": change.value, "low": change.low, "high": change.high,
            "closed": (values[1] - values[2]) / lost if lost else None,
        }  # fmt: skip
    return {"on": on, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
