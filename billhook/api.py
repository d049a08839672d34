"""The functions behind the commands: what `billhook prune` does, `billhook.prune` does."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from billhook.core.errors import FingerprintError, writing
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.target_folder import check_target, named_folder
from billhook.core.options import EvaluateOptions, PruneOptions, ScoreOptions, shows_options
from billhook.core.plan import Plan, Site
from billhook.core.plan_files import find_path
from billhook.core.registry import MethodInfo, OptionValues, resolve_options
from billhook.core.results.measured import Estimate, EvalResult, Score
from billhook.core.results.model import (
    BlockScore,
    Evaluation,
    GroupScores,
    Inspection,
    MetricScores,
    ScoreTable,
    SiteScore,
    SpanScore,
    WorkEstimate,
)
from billhook.core.results.run import RunResult
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run
from billhook.core.statistics import exp_capped, mean_interval, score_interval
from billhook.data.windows import fixed_windows, per_byte_and_word
from billhook.engine.losses import ITEM_LOSSES, LOSSES, parse_loss
from billhook.engine.probe import Probe
from billhook.engine.workers.crew import parse_workers
from billhook.methods.evaluate import EVALUATIONS, evaluate_by_name
from billhook.methods.evaluate.perplexity import measure_perplexity
from billhook.methods.evaluate.served import served_model
from billhook.methods.export import EXPORTS
from billhook.methods.metrics import GROUP_METRICS, METRICS, group_metric_scores, metric_scores
from billhook.methods.recover import RECOVERIES
from billhook.methods.search import SEARCHES
from billhook.models.device import dtype_name
from billhook.models.load import Model, Teacher, as_teacher, loaded_by_name, name_of
from billhook.models.pruned_config import require_prunable
from billhook.models.repair import NO_REPAIR
from billhook.report.run_report import write_report
from billhook.runs import check_inputs, require_model, unfinished_run
from billhook.runs import list_runs as list_runs
from billhook.runs import show as show
from billhook.runs.exporting import recipe_for_targets
from billhook.runs.job import run_environment
from billhook.runs.pipeline import delete_unfinished, preview_run, run_pruning
from billhook.runs.prepare import load_teacher, open_model, read_calibration, read_held_out
from billhook.runs.recipe import (
    TARGETS,
    CalibrationOptions,
    EvalOptions,
    Recipe,
    parse_options,
    parse_recipe,
    require_effect,
    with_overrides,
)
from billhook.runs.recipes.builtin import BuiltinRecipe, builtin_recipes
from billhook.runs.recipes.effort import EFFORTS, STANDARD, recipe_of
from billhook.runs.store import STORE, Store
from billhook.studies.monitoring.alerting import Alarm, RulesFile, check_result


@shows_options(PruneOptions, Recipe.model_fields)
def prune(
    model: Model = "demo",
    *,
    recipe: str | Path | None = None,
    effort: str | None = None,
    out: str | Path | None = None,
    rules: RulesFile = None,
    webhook: str | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[PruneOptions],
) -> RunResult:
    """Prune a model and prove it; returns the result that report.json holds.

    `model`: a folder, a .gguf file, a Hugging Face name, `demo`, or a loaded Teacher. `recipe`: a YAML file, or the
    name of one of ours. Where it is left out, and `search` too, `effort` chooses it: quick, standard (the default) or
    thorough, which narrow and remove sites and recover the rest; for a size in sites or blocks whole ones go.
    `options`: the fields of `Recipe`, which overrule it; one of `remove`, `plan` and `within` is needed. The checkpoint
    and its report appear at `out` (default: pruned/<run>), whole or not at all.
    `rules`: a YAML file of rules, whose alerts are events (default: those of Billhook for runs). `webhook`: an http or
    https address that alerts are sent to; its failure never ends a run.
    Measurements that `store` holds are not repeated. Raises BillhookError; nothing half-written remains.
    """
    alarm, asked = Alarm.read(rules, webhook, "runs"), _asked(model, recipe, effort, options)
    check_inputs(asked, store=store)
    where = named_folder(out if out is not None else Path("pruned") / "{run}")
    check_target(where, find_path(asked.model))
    if not isinstance(model, Teacher):
        require_model(asked.model)
    with writing(), closing(Store(Path(store))) as opened:
        delete_unfinished(opened)
        run = opened.new_run(PRUNE, asked.model_dump(), run_environment(asked.device, opened), str(where))
        result = run_pruning(opened, opened.run(run), watch, write_report, loaded_by_name(model))
        check_result(opened, run, watch, result, alarm, target=asked.model, folder=result.out)
        return result


@shows_options(PruneOptions, Recipe.model_fields)
def dry_run(
    model: Model = "demo",
    *,
    recipe: str | Path | None = None,
    effort: str | None = None,
    watch: EventListener = ignore_events,
    **options: Unpack[PruneOptions],
) -> WorkEstimate:
    """What `prune` with the same options would do: losses to measure, memory, disk and time. Writes nothing."""
    return preview_run(_asked(model, recipe, effort, options), watch, loaded_by_name(model))


def _asked(model: Model, recipe: str | Path | None, effort: str | None, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a call: the one that it names, or that of an effort for what it asks."""
    chosen, overruled = recipe_of(options, recipe, effort)
    if recipe is None and chosen is not None and options.get("target"):
        fit = recipe_for_targets(chosen, model, options)
        chosen, overruled = (chosen, overruled) if fit == chosen else (fit, EFFORTS[effort or STANDARD].others)
    asked = parse_recipe(with_overrides(chosen, **overruled | {"model": name_of(model), **options}), "The call")
    require_effect(options, asked)
    return asked


@shows_options(PruneOptions, Recipe.model_fields, unset=True)
def resume(
    run: str | None = None,
    *,
    out: str | Path | None = None,
    rules: RulesFile = None,
    webhook: str | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[PruneOptions],
) -> RunResult:
    """Go on with an unfinished run (the newest one if none is named); nothing that was measured is measured again.

    `out`: another folder for the checkpoint than the one that the run was begun with. `rules`, `webhook`: as for
    `prune`. The folder in which a run was begun may have been moved with its store.
    Raises RunError if there is none, FingerprintError if `options`, fields of `Recipe`, are not the run's; `workers`
    may differ.
    """
    alarm = Alarm.read(rules, webhook, "runs")
    elsewhere = None if out is None else named_folder(out)
    with writing(), closing(Store(Path(store))) as opened:
        chosen = unfinished_run(opened, run)
        _same_recipe(chosen, options)
        if "workers" in options:
            workers = parse_workers(options["workers"]).spelled()
            chosen = replace(chosen, spec={**chosen.spec, "workers": workers})
        result = run_pruning(opened, chosen, watch, write_report, out=elsewhere)
        target = str(chosen.spec.get("model", ""))
        check_result(opened, chosen.id, watch, result, alarm, target=target, folder=result.out)
        return result


def _same_recipe(run: Run, options: Mapping[str, Any]) -> None:
    """Raises FingerprintError unless `options` are what the run was begun with."""
    dropped = dict.fromkeys(TARGETS) if any(name in TARGETS for name in options) else {}
    asked = parse_recipe({**run.spec, **dropped, **options}, "The call").model_dump()
    differ = [name for name in options if asked[name] != run.spec.get(name) and name != "workers"]
    if differ:
        raise FingerprintError(
            f"Run {run.id} was begun with another recipe ({', '.join(differ)} differ). Resume it without options, "
            "or begin a new run: what was measured is reused wherever it fits."
        )


def inspect(
    model: Model = "demo",
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
    watch: EventListener = ignore_events,
) -> Inspection:
    """The anatomy of a model: every site with parameters, bytes, KV-cache bytes and FLOPs per token, and totals.

    `model`: as for `load`, whose options are passed on, or a loaded Teacher.
    """
    teacher = as_teacher(
        model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, memory=memory, watch=watch
    )
    return Inspection(
        model=teacher.name,
        type=teacher.model.config.model_type,
        fingerprint=teacher.fingerprint,
        dtype=dtype_name(teacher.dtype),
        already_removed=teacher.removed_earlier,
        anatomy=teacher.anatomy,
        total=teacher.anatomy.sizes(),
    )


@shows_options(EvaluateOptions, EvalOptions.model_fields)
def evaluate(
    model: Model = "demo",
    *,
    protocol: str | None = None,
    evaluations: str | Sequence[str] = (),
    watch: EventListener = ignore_events,
    **options: Unpack[EvaluateOptions],
) -> Evaluation:
    """Perplexity of one model on held-out text, with its 95% interval over texts, and in bytes and words.

    `options`: the fields of `Recipe` that concern model, text and seed; the text is the one on which `prune` with the
    same options proves its student, so that the two can be compared. `protocol`: all of the text, in windows, as papers
    measure it: gptq (2,048 tokens) or shortened-llama (128). `evaluations`: names of `billhook methods`, instead of
    perplexity; each is given those of the options `set` that it takes. The result has them in `evaluations`.
    """
    names = dict.fromkeys((evaluations,) if isinstance(evaluations, str) else evaluations)
    recipe = parse_options(EvalOptions, {"model": name_of(model), **options})
    teacher = open_model(recipe, watch, loaded_by_name(model))
    if protocol is None:
        tokens = read_held_out(recipe, teacher, watch)
    else:
        source = recipe.eval_data or recipe.data
        tokens = fixed_windows(source, protocol, recipe.field, teacher.tokenizer, teacher.model.config)
    if names:
        found = evaluate_by_name(teacher, tokens, list(names), recipe.set, watch=watch, who=teacher.name)
        estimates = {name: _estimate(each, recipe.seed) for name, each in found.items()}
        return Evaluation(teacher.name, tokens.info(), protocol, evaluations=estimates)
    memory = recipe.memory_bytes
    result = next(measure_perplexity(teacher, [(Plan(), NO_REPAIR)], tokens, memory=memory, watch=watch))
    told = Evaluation(teacher.name, tokens.info(), protocol, _estimate(result, recipe.seed))
    if served_model(teacher) is not None:  # which turns no tokens back into text
        return told
    bits, word = per_byte_and_word(tokens, teacher.tokenizer, math.fsum(result.sums))
    return replace(told, bits_per_byte=bits, word_perplexity=word)


def _estimate(result: EvalResult, seed: int) -> Estimate:
    """The mean of an evaluation with its 95% interval over texts; of nats, their exp."""
    mean = mean_interval(result, seed)
    return mean.mapped(exp_capped) if result.name == "perplexity" else mean


@shows_options(ScoreOptions, CalibrationOptions.model_fields)
def score(
    model: Model = "demo",
    metric: str = "cosine",
    *,
    set: OptionValues | list[str] | None = None,
    watch: EventListener = ignore_events,
    **fields: Unpack[ScoreOptions],
) -> ScoreTable:
    """How much sites, blocks and spans of blocks matter, by one metric or by several with commas between their names.

    `model`: as for `load`, or a loaded Teacher. `set`: options of the metrics, such as {"kind": "vector"}; each is
    given those that it takes. `fields`: those of `Recipe` that concern model, memory, text and seed. Higher = removal
    hurts more. Returns `sites`, `blocks` and `spans`, each with value, standard error and 95% interval, and `groups`,
    each with the numbers and values of a site's channel groups, in `scores` by metric; of a single metric also as
    attributes of the result. A model larger than the memory is read block by block, once for all metrics that share a
    pass.
    """
    names = list(dict.fromkeys(name.strip() for name in metric.split(",")))
    asked = parse_options(CalibrationOptions, {"model": name_of(model), "set": set or {}, **fields})
    metrics = [GROUP_METRICS[name] if name in tuple(GROUP_METRICS) else METRICS[name] for name in names]
    given = resolve_options(asked.set, *metrics)
    teacher = load_teacher(asked, watch, loaded_by_name(model))
    require_prunable(teacher.pruned, teacher.name)
    calibration = read_calibration(asked, teacher, watch)
    start = time.perf_counter()
    probe = Probe(teacher, calibration, parse_loss(asked.loss).name, memory=asked.memory_bytes)
    scores = {}
    for name, own in zip(names, given, strict=True):
        run = group_metric_scores if name in tuple(GROUP_METRICS) else metric_scores
        scores[name] = _by_kind(teacher, run(name, probe, **own))
    return ScoreTable(
        model=teacher.name,
        fingerprint=teacher.fingerprint,
        set=asked.set,
        scores=scores,
        data=calibration.info(),
        streamed=teacher.weights is not None,
        bytes_read=teacher.weights.bytes_read if teacher.weights is not None else 0,
        seconds=round(time.perf_counter() - start, 3),
    )


def _by_kind(teacher: Teacher, scores: Mapping[Any, Any]) -> MetricScores:
    """Scores of sites, of blocks, of spans of blocks and of channel groups apart."""
    sites, blocks, spans, groups = [], [], [], []
    numbers = {size.site: size.groups for size in teacher.anatomy.sites}
    for unit, score in scores.items():
        if not isinstance(score, Score):
            groups.append(GroupScores(unit, numbers[unit], tuple(score.tolist())))
            continue
        values = (score.value, score.se, *score_interval(score))
        if isinstance(unit, Site):
            sites.append(SiteScore(unit, *values))
        elif isinstance(unit, int):
            blocks.append(BlockScore(unit, *values))
        else:
            first, last = (teacher.positions.index(position) for position in unit)
            spans.append(SpanScore(unit[0], unit[1], last - first + 1, *values))
    return MetricScores(tuple(sites), tuple(blocks), tuple(spans), tuple(groups))


def list_methods() -> list[MethodInfo]:
    """Every registered method: family, name, what it does, source."""
    families = (METRICS, GROUP_METRICS, LOSSES, ITEM_LOSSES, SEARCHES, RECOVERIES, EVALUATIONS, EXPORTS)
    return [method for registry in families for method in registry.describe()]


def list_recipes() -> list[BuiltinRecipe]:
    """Every built-in recipe by name: what it does, its paper, and what it makes."""
    return builtin_recipes()
