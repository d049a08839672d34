"""Gate: whether a student is not worse than a baseline by more than the margins."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from billhook.core.errors import FingerprintError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.cache_keys import BaselineKey, EvaluationKey
from billhook.core.options import CompareOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues
from billhook.core.results.comparisons import (
    BASELINE_TEXT,
    GATE_VERDICTS,
    Baseline,
    BaselineItems,
    BaselineSet,
    GateCheck,
    GateReport,
    GateVerdict,
)
from billhook.core.results.measured import EvalResult
from billhook.core.results.specs import BaselineSpec, EvalItems, GateSpec, plain_options
from billhook.core.statistics import exp_capped
from billhook.models.device import environment
from billhook.models.load import Model, loaded_by_name, name_of
from billhook.report.compare_words import junit_xml
from billhook.runs import load_baseline, require_model
from billhook.runs.job import EvalContext
from billhook.runs.recipe import EvalOptions, parse_options
from billhook.runs.store import STORE, Store
from billhook.studies.eval_sets import (
    ComparisonSpec,
    ModelResults,
    comparison_spec,
    evaluate_on_sets,
    resolve_model,
    seen_sets,
)
from billhook.studies.monitoring.alerting import Alarm, RulesFile, check_result
from billhook.studies.run_study import NO_FOLDER, open_run, several


@shows_options(CompareOptions, EvalOptions.model_fields)
def gate(
    student: Model,
    baseline: Model,
    *,
    data: str | Sequence[str] | None = None,
    tasks: str | Sequence[str] = (),
    items: int | None = None,
    score: str | Sequence[str] = "acc",
    shots: int = 0,
    shots_from: str = "",
    margins: str | Sequence[str] = ("1pp", "3%ppl"),
    seen: bool = False,
    junit: str | Path | None = None,
    rules: RulesFile = None,
    webhook: str | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[CompareOptions],
) -> GateReport:
    """Whether a student is not worse than a baseline by more than the margins: PASS, FAIL or UNDECIDED, on every set.

    `baseline`: a model, or the name of one that `save_baseline` stored, which is not measured again: then `data`,
    `tasks` and `items` are those that it was measured on. Otherwise `data` is pydoc. `junit`: a file for JUnit XML.
    `rules`: a YAML file of rules, whose alerts are events (default: those of Billhook for runs). `webhook`: an
    http or https address that alerts are sent to. The rest is as for `compare`.
    """
    alarm = Alarm.read(rules, webhook, "runs")
    recipe = parse_options(EvalOptions, {"model": name_of(student), **options})
    on = EvalItems(() if data is None else several(data), several(tasks), items, shots, shots_from)
    spec = GateSpec(
        *(name_of(student), name_of(baseline), on, several(score), several(margins)),
        seen=seen,
        options=plain_options(options),
    )
    if name_of(baseline) not in loaded_by_name(student, baseline):
        require_model(name_of(baseline), store, baseline=True, served=True)
    with open_run(spec, recipe, Path(store), NO_FOLDER, watch, loaded=loaded_by_name(student, baseline)) as job:
        stored = load_baseline(job.store, name_of(baseline))
        if stored is not None and (
            data is not None or tasks or items is not None or shots or shots_from or several(score) != ("acc",)
        ):
            sources = ", ".join(each.source for each in stored.sets)
            raise UsageError(
                f"The baseline {baseline} was measured on {sources}. Leave {option('data')}, {option('tasks')}, "
                f"{option('items')}, "
                f"{option('shots')}, {option('shots_from')} and {option('score')} out, or name the model instead."
            )
        text = "pydoc" if data is None else data
        sets: OptionValues = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen}
        asked = comparison_spec(data=text, tasks=tasks, score=score, margins=margins, **sets)
        asked = (asked if stored is None else spec_of_baseline(stored, asked)).check()
        report = run_gate(job, name_of(student), name_of(baseline), asked)
        if junit is not None:
            write_junit(report, Path(junit))
        job.store.update(job.run, result=report.to_json())
        name = name_of(student)
        check_result(job.store, job.run, watch, report, alarm, target=name, folder=resolve_model(name, job.store))
        return report


def save_model_baseline(
    name: str,
    model: Model,
    *,
    data: str | Sequence[str],
    tasks: str | Sequence[str],
    items: int | None,
    score: str | Sequence[str],
    shots: int,
    shots_from: str,
    store: str | Path,
    watch: EventListener,
    **options: Unpack[CompareOptions],
) -> Baseline:
    """Measure a model and keep what it got under a name; as `save_baseline`, whose options these are."""
    recipe = parse_options(EvalOptions, {"model": name_of(model), **options})
    sets: OptionValues = {"items": items, "shots": shots, "shots_from": shots_from}
    asked = comparison_spec(data=data, tasks=tasks, score=score, **sets).check()
    on = EvalItems(several(data), several(tasks), items, shots, shots_from)
    spec = BaselineSpec(name, name_of(model), on, several(score), plain_options(options))
    with open_run(spec, recipe, Path(store), NO_FOLDER, watch, loaded=loaded_by_name(model)) as job:
        kept = store_baseline(job, name, name_of(model), asked)
        job.store.update(job.run, result=kept.to_json())
        return kept


def baselines(store: str | Path = STORE) -> list[Baseline]:
    """The baselines of a store, by name."""
    with closing(Store(Path(store), read_only=True)) as opened:
        return list_baselines(opened)


def store_baseline(job: EvalContext, name: str, model: str, spec: ComparisonSpec) -> Baseline:
    """Measure a model, and keep what it got under a name. Raises UsageError if the name stands for something else."""
    measured = evaluate_on_sets(job, model, spec)
    teacher, text = measured.teacher, {field: getattr(job.options, field) for field in BASELINE_TEXT}
    items = BaselineItems(spec.texts, spec.tasks, spec.items, spec.scores, spec.shots, spec.shots_from, **text)
    sets = tuple(BaselineSet(source, result.name, result.tokens) for source, result in measured.results.items())
    baseline = Baseline(name, teacher.name, teacher.fingerprint, teacher.compute_key, items, sets)
    return keep_baseline(job.store, job.run, baseline)


def keep_baseline(store: Store, run: str, baseline: Baseline) -> Baseline:
    """Keep a baseline under its name. Raises UsageError if the name stands for something else."""
    name = baseline.name
    known = Baseline.from_stored(store.remember(BaselineKey("", name), baseline.stored, run))
    if known != baseline:
        raise UsageError(
            f"The baseline {name} is stored already, of {known.model} ({known.fingerprint}). A baseline does not "
            f"change: take another name, such as {name}-2."
        )
    return _with_values(store, baseline)


def list_baselines(store: Store) -> list[Baseline]:
    """All that are stored, by name."""
    known = [_with_values(store, Baseline.from_stored(value)) for value in store.all_of(BaselineKey)]
    return sorted(known, key=lambda baseline: baseline.name)


def _with_values(store: Store, baseline: Baseline) -> Baseline:
    """A baseline with the perplexities and accuracies that the store holds of it."""
    sets = []
    for each in baseline.sets:
        result = baseline_result(store, baseline, each.score, each.tokens)
        sets.append(replace(each, value=None if result is None else _shown(result)))
    return replace(baseline, sets=tuple(sets))


def baseline_result(store: Store, baseline: Baseline, score: str, tokens: str) -> EvalResult | None:
    """What a baseline got on one set, item by item; None where the store does not hold it."""
    return store.lookup(EvaluationKey(baseline.fingerprint, Plan(), score, tokens, baseline.compute))


def spec_of_baseline(baseline: Baseline, spec: ComparisonSpec) -> ComparisonSpec:
    """What a baseline was measured on, with the margins of now."""
    own = baseline.items
    sets = replace(spec, texts=own.texts, tasks=own.tasks, items=own.items, scores=own.scores)
    return replace(sets, shots=own.shots, shots_from=own.shots_from)


def run_gate(job: EvalContext, student: str, baseline: str, spec: ComparisonSpec) -> GateReport:
    """Whether a student loses no more than the margins on every set, each with 95% confidence.

    Every set must pass, so that no correction for several tests is due (Berger 1982, the intersection-union test).
    """
    stored = load_baseline(job.store, baseline)
    if stored is not None:
        job = replace(job, options=job.options.model_copy(update=stored.items.text_fields()))
    tested = evaluate_on_sets(job, student, spec)
    if stored is not None:
        results, fingerprint = cached_results(job, stored, tested), stored.fingerprint
    else:
        other = evaluate_on_sets(job, baseline, spec)
        results, fingerprint = _compute_results(other, tested), other.teacher.fingerprint
    same = fingerprint == tested.teacher.fingerprint
    checks = []
    for source, result in tested.results.items():
        margin = spec.margins.on(source, result.name)
        kept = margin.check(results[source], result, job.options.seed, same=same)
        word: GateVerdict = "PASS" if kept.within else "FAIL" if kept.lost.low > margin.limit else "UNDECIDED"
        values = _shown(results[source]), _shown(result), kept.in_units(margin.kind)
        checks.append(GateCheck(source, result.name, len(result.sums), word, *values, margin))
    return GateReport(
        verdict=min((check.verdict for check in checks), key=GATE_VERDICTS.index),
        student=tested.teacher.name,
        baseline=baseline,
        checks=tuple(checks),
        seen=seen_sets(tested.teacher, tested.seen),
        environment=environment(tested.teacher.place),
    )


def cached_results(job: EvalContext, baseline: Baseline, student: ModelResults) -> dict[str, EvalResult]:
    """The stored results of a baseline. Raises FingerprintError if the student has other items.

    A server has no tokens that are known: its items are told by the texts that they come from.
    """
    results, asked = {}, {each.source: each.tokens for each in baseline.sets}
    for source, result in student.results.items():
        tokens = result.tokens if baseline.served is None else asked[source]
        kept = baseline_result(job.store, baseline, result.name, tokens)
        if kept is None or kept.clusters != result.clusters:
            raise FingerprintError(
                f"{source} gives {student.teacher.name} other tokens than the baseline {baseline.name} was measured "
                "on: the file has changed, or the tokenizer is another one. Save a new baseline."
            )
        results[source] = replace(kept, tokens=result.tokens)
    return results


def _compute_results(baseline: ModelResults, student: ModelResults) -> dict[str, EvalResult]:
    """The results of another model on the student's items."""
    results = {}
    for source, own in student.results.items():
        result = baseline.results[source]
        if result.tokens != own.tokens:
            if student.sets[source].kind == "text":
                raise FingerprintError(
                    f"{student.teacher.name} and {baseline.teacher.name} have different tokenizers, so their "
                    f"perplexities on {source} do not pair. Gate on {option('tasks')} alone: {option('data', '')}."
                )
            result = replace(result, tokens=own.tokens)
        results[source] = result
    return results


def _shown(result: EvalResult) -> float:
    """Perplexity, or accuracy."""
    return exp_capped(result.mean) if result.name == "perplexity" else result.mean


def write_junit(report: GateReport, path: Path) -> None:
    """A gate as JUnit XML, which continuous integration shows. Written aside and renamed."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(junit_xml(report))
    aside.rename(path)
