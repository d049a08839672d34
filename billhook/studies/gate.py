"""Gate: whether a student is not worse than a baseline by more than the margins."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from billhook.core.errors import FingerprintError, UsageError, nearest
from billhook.core.events import EventListener, ignore_events
from billhook.core.margin import BOUND, Margin
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.core.results.specs import BaselineSpec, EvalItems, GateSpec, plain_options
from billhook.core.statistics import exp_capped, reliability_note
from billhook.models.device import environment
from billhook.runs.job import RunContext
from billhook.runs.recipe import of_text
from billhook.runs.store import STORE, Store
from billhook.studies.eval_sets import ComparisonSpec, ModelResults, comparison_spec, evaluate_on_sets
from billhook.studies.run_study import NO_FOLDER, open_run, several


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
    on = EvalItems(() if data is None else several(data), several(tasks), items, shots, shots_from)
    spec = GateSpec(
        *(str(student), str(baseline), on, several(score), margins), seen=seen, options=plain_options(options)
    )
    with open_run(spec, recipe, Path(store), NO_FOLDER, watch) as job:
        stored = load_baseline(job.store, str(baseline))
        if stored is not None and (
            data is not None or tasks or items is not None or shots or shots_from or several(score) != ("acc",)
        ):
            raise UsageError(
                f"The baseline {baseline} was measured on {', '.join(stored['sets'])}. Leave --data, --tasks, --items, "
                "--shots, --shots-from and --score out, or name the model instead."
            )
        text = "pydoc" if data is None else data
        sets: dict[str, Any] = {"items": items, "shots": shots, "shots_from": shots_from, "seen": seen}
        asked = comparison_spec(data=text, tasks=tasks, score=score, margins=margins, **sets)
        asked = asked.check() if stored is None else spec_of_baseline(stored, asked)
        told = run_gate(job, str(student), str(baseline), asked)
        if junit is not None:
            write_junit(told, Path(junit))
        job.store.update(job.run, result=told)
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
    asked = comparison_spec(data=data, tasks=tasks, score=score, **sets).check()
    on = EvalItems(several(data), several(tasks), items, shots, shots_from)
    spec = BaselineSpec(name, str(model), on, several(score), plain_options(options))
    with open_run(spec, recipe, Path(store), NO_FOLDER, watch) as job:
        told = store_baseline(job, name, str(model), asked)
        job.store.update(job.run, result=told)
        return told


def baselines(store: str | Path = STORE) -> list[dict[str, Any]]:
    """The baselines of a store, by name."""
    with closing(Store(Path(store))) as opened:
        return list_baselines(opened)


GATE_OUTCOMES = ("FAIL", "UNDECIDED", "PASS")  # the worst of all sets is that of the whole
TEXT_FIELDS = ("field", "eval_tokens", "eval_length", "seed")  # of a recipe, that decide which items there are


def store_baseline(job: RunContext, name: str, model: str, spec: ComparisonSpec) -> dict[str, Any]:
    """Measure a model, and keep what it got under a name. Raises UsageError if the name stands for something else."""
    side = evaluate_on_sets(job, model, spec)
    told: dict[str, Any] = {
        "name": name,
        "model": side.teacher.name,
        "fingerprint": side.teacher.fingerprint,
        "compute": side.teacher.compute_key,
        "asked": asdict(replace(spec, timed=False)),
        "text": {field: getattr(job.recipe, field) for field in TEXT_FIELDS},
        "sets": {source: [result.name, result.tokens] for source, result in side.results.items()},
    }
    told = json.loads(json.dumps(told))  # as it is stored
    known = job.store.cached("", "baseline", {"name": name})
    if known is not None and known != told:
        raise UsageError(
            f"The baseline {name} is stored already, of {known['model']} ({known['fingerprint']}). A baseline does not "
            f"change: take another name, such as {name}-2."
        )
    job.store.remember("", "baseline", {"name": name}, told, job.run)
    return told | {"values": {source: _shown(side.results[source]) for source in side.sets}}


def list_baselines(store: Store) -> list[dict[str, Any]]:
    """All that are stored, by name."""
    return sorted(store.all_cached("", "baseline"), key=lambda told: str(told["name"]))


def spec_of_baseline(baseline: Mapping[str, Any], spec: ComparisonSpec) -> ComparisonSpec:
    """What a baseline was measured on, with the margins of now."""
    own = baseline["asked"]
    same: dict[str, Any] = {name: tuple(own[name]) for name in ("texts", "tasks", "scores")}
    return replace(spec, **same, **{name: own[name] for name in ("items", "shots", "shots_from")})


def load_baseline(store: Store, name: str) -> dict[str, Any] | None:
    """A stored baseline; None if the name is a model's. Raises UsageError for a name that is nearly one's."""
    known = store.cached("", "baseline", {"name": name})
    if known is None and not Path(name).exists() and "/" not in name and name != "demo":
        names = [str(told["name"]) for told in list_baselines(store)]
        near = nearest(name, names)
        if near:
            raise UsageError(f"There is no baseline {name!r}. Did you mean {near!r}? Stored: {', '.join(names)}.")
    return known


def run_gate(job: RunContext, student: str, baseline: str, spec: ComparisonSpec) -> dict[str, Any]:
    """Whether a student loses no more than the margins on every set, each with 95% confidence.

    Every set must pass, so that no correction for several tests is due (Berger 1982, the intersection-union test).
    """
    stored = load_baseline(job.store, baseline)
    if stored is not None:
        job = replace(job, recipe=job.recipe.model_copy(update=stored["text"]))
    mine = evaluate_on_sets(job, student, spec)
    if stored is not None:
        theirs, fingerprint = _cached_results(job, stored, mine), stored["fingerprint"]
    else:
        other = evaluate_on_sets(job, baseline, spec)
        theirs, fingerprint = _compute_results(other, mine), other.teacher.fingerprint
    same = fingerprint == mine.teacher.fingerprint
    checks = []
    for source, result in mine.results.items():
        kind = "perplexity" if result.name == "perplexity" else "accuracy"
        margin = Margin.parse(f"{spec.percent}%ppl" if kind == "perplexity" else f"{spec.points}pp:{source}")
        kept = margin.check(theirs[source], result, job.recipe.seed, same=same)
        lost = kept.in_units(margin.kind)
        limit = spec.percent if kind == "perplexity" else spec.points
        word = "PASS" if kept.within else "FAIL" if kept.lost.low > margin.limit else "UNDECIDED"
        checks.append({
            "set": source, "kind": kind, "score": result.name, "n": len(result.sums), "verdict": word,
            "baseline": _shown(theirs[source]), "student": _shown(result), "lost": lost.value,
            "low": lost.low, "high": lost.high, "margin": limit, "reliable": lost.reliable, "note": reliability_note(lost),
        })  # fmt: skip
    return {
        "verdict": min((check["verdict"] for check in checks), key=GATE_OUTCOMES.index),
        "student": mine.teacher.name,
        "baseline": baseline,
        "checks": checks,
        "seen": {mine.teacher.name: list(mine.seen)} if mine.seen else {},
        "environment": asdict(environment(str(mine.teacher.device))),
    }


def _cached_results(job: RunContext, baseline: Mapping[str, Any], student: ModelResults) -> dict[str, EvalResult]:
    """What a baseline got, which is not measured again. Raises FingerprintError if the student has other items."""
    found = {}
    for source, result in student.results.items():
        kept = job.store.evaluation(baseline["fingerprint"], Plan(), result.name, result.tokens, baseline["compute"])
        if kept is None:
            raise FingerprintError(
                f"{source} gives {student.teacher.name} other tokens than the baseline {baseline['name']} was measured on: "
                "the file has changed, or the tokenizer is another one. Save a new baseline."
            )
        found[source] = kept
    return found


def _compute_results(baseline: ModelResults, student: ModelResults) -> dict[str, EvalResult]:
    """What another model got on the student's items."""
    found = {}
    for source, own in student.results.items():
        result = baseline.results[source]
        if result.tokens != own.tokens:
            if student.sets[source].kind == "text":
                raise FingerprintError(
                    f"{student.teacher.name} and {baseline.teacher.name} have different tokenizers, so their perplexities "
                    f"on {source} do not pair. Gate on --tasks alone: --data ''."
                )
            result = replace(result, tokens=own.tokens)
        found[source] = result
    return found


def _shown(result: EvalResult) -> float:
    """Perplexity, or accuracy."""
    return exp_capped(result.mean) if result.name == "perplexity" else result.mean


def write_junit(result: Mapping[str, Any], path: Path) -> None:
    """A gate as JUnit XML, a test case a set: what continuous integration shows. Written aside and renamed."""
    checks = result["checks"]
    failed = sum(check["verdict"] != "PASS" for check in checks)
    suite = ET.Element("testsuite", name="billhook gate", tests=str(len(checks)), failures=str(failed))
    for check in checks:
        case = ET.SubElement(
            suite, "testcase", classname=str(result["student"]), name=f"{check['set']} ({check['score']})"
        )
        if check["verdict"] != "PASS":
            failure = ET.SubElement(case, "failure", type=check["verdict"], message=describe_check(check))
            failure.text = describe_check(check)
        ET.SubElement(case, "system-out").text = describe_check(check)
    aside = path.with_name(f".{path.name}.partial")
    ET.ElementTree(suite).write(aside, encoding="utf-8", xml_declaration=True)
    aside.rename(path)


def describe_check(check: Mapping[str, Any]) -> str:
    """`loses 1.20 pp (one-sided 95%: 0.10 to 2.40); 1 may go`."""
    unit = "% of perplexity" if check["kind"] == "perplexity" else "pp"
    verb = "loses" if check["lost"] >= 0 else "gains"
    return (
        f"{verb} {abs(check['lost']):.2f} {unit} ({BOUND}: {check['low']:.2f} to {check['high']:.2f}); "
        f"{check['margin']:g} may go"
    )
