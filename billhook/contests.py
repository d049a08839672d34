"""What is held against each other: recipes, tasks, calibration texts, and models. The functions behind the commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from billhook import (
    abtest,
    compare_page,
    comparing,
    gating,
    lab,
    lab_page,
    proof,
    searching,
    threshold_page,
    thresholds,
)
from billhook.api import STORE, of_text, run_environment
from billhook.endpoint import Endpoint
from billhook.errors import UsageError
from billhook.export.checkpoint import check_target
from billhook.margin import Margin, parse_amount
from billhook.metrics import METRICS
from billhook.portions import external_sources
from billhook.prompts import read_prompts
from billhook.recipe import Recipe, parse_recipe
from billhook.records import EventListener, ignore_events
from billhook.store import Store

NO_FOLDER = "-"  # the out of a run that writes no files


def sweep(
    model: str | Path = "demo",
    recipes: str | Sequence[str] = ("billhook",),
    *,
    remove: str | Sequence[str] = ("10%", "20%", "30%"),
    data: str | Sequence[str] = ("pydoc",),
    eval_data: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    items: int = 200,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """Recipes against each other at several sizes on several calibration texts; a page, and the table behind it.

    `recipes`: names of ours, or YAML files. `eval_data`: held-out texts (default: those of `data`); `tasks`: files of
    multiple-choice items, of which `items` are measured. `options`: fields of `Recipe` that overrule every recipe, such
    as `tokens`. Nothing that `store` holds is measured again, so that a sweep which was killed goes on.
    """
    texts = _several(data)
    held_out = _several(eval_data) or tuple(dict.fromkeys(filter(None, map(external_sources, texts))))
    if not held_out:
        raise UsageError("What a model writes itself proves nothing. Name a text to measure on: --eval-data FILE.")
    grid = lab.Grid(_several(recipes), _several(remove), texts, held_out, _several(tasks), items)
    first = lab.recipes_of(grid, str(model), options)[0][1]
    with _study("sweep", first, Path(store), out, watch) as (bench, folder):
        return lab.write_study(lab.run_sweep(bench, grid, options), folder, lab_page.sweep_page, bench.store, bench.run)


def transfer(
    model: str | Path = "demo",
    tasks: str | Sequence[str] = (),
    *,
    items: int = 200,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """What adapting to one task costs on others: pruned for each of `tasks`, measured on each, with paired intervals.

    `tasks`: files of multiple-choice items, of which `items` are measured and others calibrated on. `options`: fields
    of `Recipe`; `remove` is needed.
    """
    if not tasks:
        raise UsageError("There is no task to trade. Name files of multiple-choice items: --tasks a.jsonl,b.jsonl.")
    first = parse_recipe({"model": str(model), **options}, "The call")
    with _study("trade", first, Path(store), out, watch) as (bench, folder):
        told = lab.run_transfer(bench, _several(tasks), items, options)
        return lab.write_study(told, folder, lab_page.transfer_page, bench.store, bench.run)


def stability(
    model: str | Path = "demo",
    metric: str = "loo_kl",
    *,
    sizes: Sequence[int] = (512, 2048),
    draws: int = 4,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """How far scores and plans depend on the calibration text: `draws` sets of each of `sizes` tokens, disjoint.

    Rank correlation of a metric's scores of sites, and overlap of the plans of the recipe's search. `options`: fields
    of `Recipe`; `remove` is needed.
    """
    METRICS[metric]
    if draws < 2 or not sizes:
        raise UsageError("Stability compares sets: ask for at least 2 --draws and one of --sizes.")
    first = parse_recipe({"model": str(model), **options}, "The call")
    with _study("stability", first, Path(store), out, watch) as (bench, folder):
        told = lab.run_stability(bench, metric, tuple(sizes), draws, options)
        return lab.write_study(told, folder, lab_page.stability_page, bench.store, bench.run)


# -- against each other ----------------------------------------------------------------------------------------------


def compare(
    *models: str | Path,
    data: str | Sequence[str] = ("pydoc",),
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    margins: tuple[str, str] = ("1pp", "3%"),
    timed: bool = True,
    seen: bool = False,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """The first of `models` against each other one, over the same items: verdicts with intervals, and a page.

    `models`: as for `load`, or runs of `store`. `data`: texts, of which the held-out half counts; `tasks`: files of
    multiple-choice items, of which the half counts that no search looks at, files of questions that are answered in
    writing, or lmeval:NAME; `items` of each if given; `score`: that verdicts are about, where a task has it. `shots`:
    solved items before each, from the file `shots_from` if not from the task's own. `margins`: how much less accuracy,
    and how much more perplexity, is as good. `timed`: speed and memory, in turn. `seen`: also where a search has seen
    some of the data. `options`: fields of `Recipe` on text and seed.
    """
    if len(models) < 2:
        raise UsageError("Name two models at least, the one that the others are held against first: compare A B.")
    sets: dict[str, Any] = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen, "timed": timed}
    asked = _comparison_spec(data=data, tasks=tasks, score=score, margins=margins, **sets).check()
    recipe = of_text(str(models[0]), options)
    with _study_run("compare", recipe, Path(store), out) as (opened, run, folder):
        job = proof.RunContext(recipe, opened, run, folder, watch, {})
        told = comparing.compare_models(job, [str(name) for name in models], asked)
        return lab.write_study(told, folder, compare_page.comparison_page, opened, run)


def evaluate_tasks(
    model: str | Path = "demo",
    tasks: str | Sequence[str] = (),
    *,
    items: int | None = None,
    shots: int = 0,
    shots_from: str = "",
    evaluations: str | Sequence[str] = (),
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """Every score of one model on all items of tasks, or on `items` of each, with 95% intervals over items.

    `tasks`, `shots`: as for `compare`. Answers are filed in `store` portion by portion: an evaluation that was killed
    goes on behind the last one. `evaluations`: names of `billhook methods`, in the place of all scores. `options`:
    fields of `Recipe` on model, memory and seed, and `set` for the evaluations.
    """
    recipe = of_text(str(model), options)
    asked = _comparison_spec(
        data=(), tasks=tasks, items=items, shots=shots, shots_from=shots_from, evaluations=_several(evaluations)
    ).check()
    with _study_run("eval", recipe, Path(store), NO_FOLDER) as (opened, run, _):
        told = comparing.evaluate_on_tasks(proof.RunContext(recipe, opened, run, Path(), watch, {}), str(model), asked)
        opened.update(run, result=told)
        return told


def gate(
    student: str | Path,
    baseline: str | Path,
    *,
    data: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    margins: tuple[str, str] = ("1pp", "3%"),
    seen: bool = False,
    junit: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """Whether a student is not worse than a baseline by more than the margins: PASS, FAIL or UNDECIDED, on every set.

    `baseline`: a model, or the name of one that `save_baseline` stored, which is not measured again: then `data`,
    `tasks` and `items` are those that it was measured on. Else `data` is pydoc. `junit`: a file for JUnit XML. The rest
    is as for `compare`.
    """
    recipe = of_text(str(student), options)
    with _study_run("gate", recipe, Path(store), NO_FOLDER) as (opened, run, _):
        stored = gating.load_baseline(opened, str(baseline))
        if stored is not None and (
            data is not None or tasks or items is not None or shots or shots_from or _several(score) != ("acc",)
        ):
            raise UsageError(
                f"The baseline {baseline} was measured on {', '.join(stored['sets'])}. Leave --data, --tasks, --items, "
                "--shots, --shots-from and --score out, or name the model instead."
            )
        text = "pydoc" if data is None else data
        sets: dict[str, Any] = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen}
        asked = _comparison_spec(data=text, tasks=tasks, score=score, margins=margins, **sets)
        asked = asked.check() if stored is None else gating.spec_of_baseline(stored, asked)
        told = gating.run_gate(
            proof.RunContext(recipe, opened, run, Path(), watch, {}), str(student), str(baseline), asked
        )
        if junit is not None:
            gating.write_junit(told, Path(junit))
        opened.update(run, result=told)
        return told


def save_baseline(
    name: str,
    model: str | Path = "demo",
    *,
    data: str | Sequence[str] = ("pydoc",),
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model and keep what it got under a name, for `gate`. A name never changes what it stands for."""
    recipe = of_text(str(model), options)
    sets: dict[str, Any] = {"items": items, "shots": shots, "shots_from": shots_from}
    asked = _comparison_spec(data=data, tasks=tasks, score=score, **sets).check()
    with _study_run("baseline", recipe, Path(store), NO_FOLDER) as (opened, run, _):
        job = proof.RunContext(recipe, opened, run, Path(), watch, {})
        told = gating.store_baseline(job, name, str(model), asked)
        opened.update(run, result=told)
        return told


def baselines(store: str | Path = STORE) -> list[dict[str, Any]]:
    """The baselines of a store, by name."""
    with closing(Store(Path(store))) as opened:
        return gating.list_baselines(opened)


def threshold(
    model: str | Path = "demo",
    *,
    margins: str | Sequence[str] = ("3%ppl",),
    run: str | None = None,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Any,
) -> dict[str, Any]:
    """How much can go: the last step of a search that is within every margin, chosen on some texts, proved on others.

    `margins`: such as 3%ppl or 1pp:FILE. `run`: the steps of a stored run are taken, with its model and its texts; else
    a search is made by `options`, fields of `Recipe`, up to `remove` (default: 40%). A plan file and a page appear in
    `out` (default: lab/<run>): `billhook prune --plan` takes the plan.
    """
    parsed = [Margin.parse(text) for text in _several(margins)]
    with closing(Store(Path(store))) as opened:
        stored = opened.run(run) if run is not None else None
    if stored is not None and ("laboratory" in stored.environment or not (stored.result or {}).get("steps")):
        raise UsageError(f"Run {run} has no steps of a search. `billhook runs` lists the runs.")
    least: dict[str, Any] = {"remove": "40%"}
    given = stored.recipe if stored is not None else least | {"model": str(model)}
    recipe = parse_recipe(given | options, "The call")
    with _study("threshold", recipe, Path(store), out, watch) as (bench, folder):
        steps = [] if stored is None else (stored.result or {})["steps"]
        told = thresholds.find_threshold(bench.job(recipe), bench.teacher, steps, parsed)
        return lab.write_study(told, folder, threshold_page.threshold_page, bench.store, bench.run)


def ab_test(
    a: str, b: str, prompts: str | Path, *, model_a: str = "", model_b: str = "", api_key_env_a: str = "",
    api_key_env_b: str = "", limit: int | None = None, store: str | Path = STORE, watch: EventListener = ignore_events, **asking: Any,
) -> dict[str, Any]:  # fmt: skip
    """Two OpenAI-compatible servers on the prompts of a file: times, errors, agreement, and task scores, in pairs.

    `prompts`: a .txt, a .jsonl with `prompt` or `messages`, or a task's items; `limit` of them. `asking`: fields of
    `Asking`, such as `timeout`. The result, with every answer, is filed in `store`.
    """
    how = abtest.request_options(asking)
    ends = Endpoint.create("A", a, model_a, api_key_env_a), Endpoint.create("B", b, model_b, api_key_env_b)
    found = read_prompts(prompts, how.kind, limit, how.seed)
    where = asdict(proof.environment("cpu")) | {"folder": str(Path.cwd()), "laboratory": "abtest"}
    with closing(Store(Path(store))) as opened:
        run = opened.new_run(abtest.run_config(*ends, str(prompts), limit, how), where, "")
        with opened.lock_and_track(run):
            told = {"run": run, "prompts": str(prompts)} | abtest.run_ab_test(*ends, found, how, watch)
            opened.update(run, state="done", result=told)
        return told


def _comparison_spec(
    *, data: str | Sequence[str], tasks: str | Sequence[str], score: str | Sequence[str] = "acc",
    margins: tuple[str, str] = ("1pp", "3%"), **same: Any,
) -> comparing.ComparisonSpec:  # fmt: skip
    points, percent = parse_amount(margins[0], "pp"), parse_amount(margins[1], "%")
    return comparing.ComparisonSpec(
        _several(data), _several(tasks), scores=_several(score), points=points, percent=percent, **same
    )


def _several(values: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return ((values,) if values else ()) if isinstance(values, str) else tuple(values)


@contextmanager
def _study(
    kind: str, recipe: Recipe, store: Path, out: str | Path | None, watch: EventListener
) -> Iterator[tuple[lab.StudyContext, Path]]:
    """A run of the store, the loaded teacher, and the folder that will hold page and table."""
    with _study_run(kind, recipe, store, out) as (opened, run, folder):
        yield lab.StudyContext(opened, run, searching.load_teacher(recipe, watch), watch), folder


@contextmanager
def _study_run(kind: str, recipe: Recipe, store: Path, out: str | Path | None) -> Iterator[tuple[Store, str, Path]]:
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
