"""Is a student still good enough? Non-inferiority on every set, against a model or a baseline stored by name."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from billhook import proof
from billhook.comparing import ComparisonSpec, ModelResults, evaluate_on_sets
from billhook.errors import FingerprintError, UsageError, nearest
from billhook.margin import BOUND, Margin
from billhook.plan import Plan
from billhook.proof import RunContext
from billhook.records import EvalResult
from billhook.stats import exp_capped
from billhook.store import Store

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
            "low": lost.low, "high": lost.high, "margin": limit, "reliable": lost.reliable, "note": lost.note,
        })  # fmt: skip
    return {
        "verdict": min((check["verdict"] for check in checks), key=GATE_OUTCOMES.index),
        "student": mine.teacher.name,
        "baseline": baseline,
        "checks": checks,
        "seen": {mine.teacher.name: list(mine.seen)} if mine.seen else {},
        "environment": asdict(proof.environment(str(mine.teacher.device))),
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
