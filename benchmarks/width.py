"""Depth against width against both, at equal parameters, without and with a refit: what docs/results.md shows of it.

    python benchmarks/width.py --data DATA                    # some hours on two cores; begin again to go on
    python benchmarks/width.py --data DATA --only 20%/flap,20%/speed,20%/options

DATA as for methods.py. Every recipe is calibrated on the same C4 text; `fold` learns from C4. A row that stands in
benchmarks/measured/width.json is not measured again, unless it is asked for by --only. `options` are other settings of
saap, without a refit. Times are taken of all models of a size in turn, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from figure import figure
from measured import put_back, written_down
from methods import LENGTH, MEASURED, SCALED, TASKS, TOKENS, file_result, texts_of  # the files beside this one
from recovery import recovered, results_of, row, tell
from results import page

import billhook
from billhook.core import statistics
from billhook.core.events import Event
from billhook.core.files.cache_keys import EvaluationKey, repaired_dtype
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.methods.evaluate import speed
from billhook.models.device import keep_freed_memory
from billhook.models.repair import NO_REPAIR
from billhook.models.surgery import apply
from billhook.runs.evaluation import repair_key
from billhook.runs.recipe import parse_recipe, with_overrides
from billhook.runs.store import Store
from billhook.studies import sweep, trials

SIZES = ("10%", "20%", "30%")
RECIPES: dict[str, dict[str, Any]] = {
    "billhook-depth": SCALED["billhook-depth"], "llm-pruner": {}, "llm-pruner by taylor_mix": {"metric": "taylor_mix"},
    "wanda-sp": {}, "flap": {}, "saap": {}, "billhook-joint": {"fast": True},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "saap with stability=0": {"set": {"stability": 0}}, "saap with within=no": {"set": {"within": False}},
    "saap with stability=0, within=no": {"set": {"stability": 0, "within": False}},
    "saap with uniform": {"uniform": True},
    "saap with uniform, stability=0": {"uniform": True, "set": {"stability": 0}},
    "saap with uniform, stability=0, fusion=vector": {"uniform": True, "set": {"stability": 0, "fusion": "vector"}},
}  # fmt: skip
OPTIONS_AT = "20%"
BATCHES = {"10%": (1, 16), "20%": (1, 4, 16, 32), "30%": (1, 16)}
FOLD_TOKENS = 16384
# What each is held against, in pairs, on every text: the best of these.
RIVALS = {
    "saap": ("llm-pruner by taylor_mix",),
    "billhook-joint": tuple(name for name in RECIPES if name != "billhook-joint"),
}


def main() -> None:
    """Prune, refit, measure, write the page."""
    every = [f"{size}/{name}" for size in SIZES for name in (*RECIPES, "speed")] + [f"{OPTIONS_AT}/options"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "docs" / "results.md")
    given = parser.parse_args()
    keep_freed_memory()
    given.work.mkdir(parents=True, exist_ok=True)
    texts, database, file = texts_of(given.data, given.work), given.work / "billhook.db", MEASURED / "width.json"
    put_back(database, MEASURED)
    told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "speed": {}}
    with closing(Store(database)) as store:
        run = store.new_run("width", {}, {}, str(given.work))
        bench = trials.StudyContext(store, run, billhook.load("demo"), tell)
        for what in given.only.split(",") if given.only else every:
            size, name = what.split("/")
            if name == "speed":
                told["speed"][size] = timed(bench, texts, size, given.work / "students")
            elif name == "options":
                told["options"] = options_of_saap(bench, texts)
            elif given.only or what not in told["rows"]:
                told["rows"][what] = measured(bench, texts, what, given.work / "training")
            told["pairs"] = {each: held_against(bench, told["rows"], each) for each in SIZES}
            told |= {"fold_tokens": FOLD_TOKENS, "tokens": TOKENS, "whole": bench.teacher.anatomy.total("parameters")}
            written_down(database, MEASURED)
            file_result("width", told)
            given.results.write_text(page(MEASURED, SCALED), encoding="utf-8")
            figure(told, given.results.with_name("width.svg"))
        store.update(run, state="done")


def tried(bench: trials.StudyContext, texts: dict[str, str], size: str, name: str) -> tuple[Any, trials.Trial]:
    """The recipe of a row, and the plan that it finds."""
    common = {
        "model": "demo", "remove": size, "data": texts["c4"], "tokens": TOKENS, "length": LENGTH, "self_share": 0.0,
    }  # fmt: skip
    recipe = parse_recipe(with_overrides(name.partition(" ")[0], **common, **(RECIPES | OPTIONS)[name]))
    return recipe, trials.run_trial(bench, name, recipe, trials.calibration_of(bench, recipe))


def measured(bench: trials.StudyContext, texts: dict[str, str], what: str, work: Path) -> dict[str, Any]:
    """One row: the plan of a recipe at a size, on two texts and three tasks, without and with `fold`."""
    size, name = what.split("/")
    recipe, trial = tried(bench, texts, size, name)
    grid = sweep.Grid((name,), (size,), (texts["c4"],), (texts["c4"], texts["wikitext2"]),
                    tuple(texts[task] for task in TASKS))  # fmt: skip
    sets = sweep.evaluation_sets(bench, grid, recipe)

    asked = recipe.model_copy(update={"recover": "fold", "recover_tokens": FOLD_TOKENS})
    start = time.perf_counter()
    repair, _ = recovered(bench.job(asked), bench, trial.plan, work)
    seconds = time.perf_counter() - start
    students = (Plan(), NO_REPAIR), (trial.plan, NO_REPAIR), (trial.plan, repair)
    sides = (results_of(bench.job(recipe), bench, sets, student) for student in students)
    anatomy = bench.teacher.anatomy
    return row(*sides, seconds) | {
        "removed": trial.plan.names(), "narrowed": trial.plan.narrowed_names(),
        "filed": {"before": bench.teacher.compute_key,
                  "after": repaired_dtype(bench.teacher.compute_key, repair_key(repair))},
        "parameters": anatomy.total("parameters", trial.plan), "kv": anatomy.total("kv_bytes_per_token", trial.plan),
    }  # fmt: skip


def held_against(bench: trials.StudyContext, rows: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """What each of `RIVALS` loses more than the best of its rivals of that size, in nats a token, without and with
    `fold`, paired over texts."""

    def filed(what: str, text: str, when: str) -> EvalResult:
        row = rows[what]
        plan = Plan.parse(row["removed"] + row["narrowed"])
        key = EvaluationKey(
            bench.teacher.fingerprint, plan, "perplexity", row["on"][text]["tokens"], row["filed"][when]
        )
        found = bench.store.lookup(key)
        assert found is not None, f"{what} was measured, but is not filed"
        return found

    told = []
    for name, others in RIVALS.items():
        mine, there = f"{size}/{name}", [f"{size}/{other}" for other in others if f"{size}/{other}" in rows]
        if mine not in rows or not there:
            continue
        for text in (text for text, on in rows[mine]["on"].items() if on["kind"] == "perplexity"):
            for when in ("before", "after"):
                best = min(there, key=lambda other: rows[other]["on"][text][when])
                gap = statistics.paired_difference(filed(best, text, when), filed(mine, text, when))
                told.append({"recipe": name, "rival": best.partition("/")[2], "text": text, "when": when,
                             "change": gap.value, "low": gap.low, "high": gap.high})  # fmt: skip
    return told


def options_of_saap(bench: trials.StudyContext, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Other settings of saap at `OPTIONS_AT`, without a recovery, in pairs against what it is meant to beat."""
    told: list[dict[str, Any]] = []
    base: dict[str, EvalResult] = {}
    for name in (RIVALS["saap"][0], "saap", *OPTIONS):
        recipe, trial = tried(bench, texts, OPTIONS_AT, name)
        grid = sweep.Grid((name,), (OPTIONS_AT,), (texts["c4"],), (texts["c4"], texts["wikitext2"]), ())
        sets = sweep.evaluation_sets(bench, grid, recipe)
        found = results_of(bench.job(recipe), bench, sets, (trial.plan, NO_REPAIR))
        base = base or found
        for text, result in found.items():
            gap = statistics.paired_difference(base[text], result)
            told.append({"recipe": name, "text": text, "perplexity": statistics.exp_capped(result.mean),
                         "change": gap.value, "low": gap.low, "high": gap.high})  # fmt: skip
        tell(Event("recovery", 1, 1, {"recovery": name}))
    return told


def timed(bench: trials.StudyContext, texts: dict[str, str], size: str, work: Path) -> dict[str, Any]:
    """Prefill and decoding of what every recipe leaves, and of the unpruned model, in turn, and peak memory."""
    shutil.rmtree(work, ignore_errors=True)
    names = ["unpruned", *RECIPES]
    plans = [Plan(), *(tried(bench, texts, size, name)[1].plan for name in RECIPES)]
    models = [bench.teacher.model, *(apply(bench.teacher, plan) for plan in plans[1:])]
    folders = [work / str(number) for number in range(len(plans))]
    models[0].save_pretrained(folders[0])
    for model, plan, folder in zip(models[1:], plans[1:], folders[1:], strict=True):
        billhook.save(model, None, plan, folder, teacher=bench.teacher)
    found: dict[str, Any] = {}
    for batch in BATCHES[size]:
        protocol = speed.TimingProtocol(batch=batch, new_tokens=16, repeats=5)
        timings = speed.time_interleaved(models, folders, protocol)
        for name, timing in zip(names, timings, strict=True):
            found.setdefault(name, {})[str(batch)] = speed.rates(timing) | {
                "ratio": speed.speed_ratio(timings[0], timing)
            }
        tell(Event("recovery", batch, max(BATCHES[size]), {"size": size, "step": "times"}))
    shutil.rmtree(work)
    return found


if __name__ == "__main__":
    main()
