"""Is a student still good enough? Non-inferiority on every set, against a model or a baseline stored by name."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from billhook import proof
from billhook.comparing import Asked, Side, measured
from billhook.errors import FingerprintError, UsageError, nearest
from billhook.margin import BOUND, Margin
from billhook.plan import Plan
from billhook.proof import Job
from billhook.records import EvalResult
from billhook.stats import exp
from billhook.store import Store

WORDS = ("FAIL", "UNDECIDED", "PASS")  # the worst of all sets is that of the whole
TEXT_FIELDS = ("field", "eval_tokens", "eval_length", "seed")  # of a recipe, that decide which items there are


def save_baseline(job: Job, name: str, model: str, asked: Asked) -> dict[str, Any]:
    """Measure a model, and keep what it got under a name. Raises UsageError if the name stands for something else."""
    side = measured(job, model, asked)
    told: dict[str, Any] = {
        "name": name,
        "model": side.teacher.name,
        "fingerprint": side.teacher.fingerprint,
        "compute": side.teacher.compute,
        "asked": asdict(replace(asked, timed=False)),
        "text": {field: getattr(job.recipe, field) for field in TEXT_FIELDS},
        "sets": {source: [result.name, result.tokens] for source, result in side.results.items()},
    }
    told = json.loads(json.dumps(told))  # as it is stored
    known = job.store.fact("", "baseline", {"name": name})
    if known is not None and known != told:
        raise UsageError(
            f"The baseline {name} is stored already, of {known['model']} ({known['fingerprint']}). A baseline does not "
            f"change: take another name, such as {name}-2."
        )
    job.store.add_fact("", "baseline", {"name": name}, told, job.run)
    return told | {"values": {source: _shown(side.results[source]) for source in side.sets}}


def baselines(store: Store) -> list[dict[str, Any]]:
    """All that are stored, by name."""
    return sorted(store.facts("", "baseline"), key=lambda told: str(told["name"]))


def asked_of(told: Mapping[str, Any], asked: Asked) -> Asked:
    """What a baseline was measured on, with the margins of now."""
    own = told["asked"]
    same: dict[str, Any] = {name: tuple(own[name]) for name in ("texts", "tasks", "scores")}
    return replace(asked, **same, **{name: own[name] for name in ("items", "shots", "shots_from")})


def baseline_of(store: Store, name: str) -> dict[str, Any] | None:
    """A stored baseline; None if the name is a model's. Raises UsageError for a name that is nearly one's."""
    known = store.fact("", "baseline", {"name": name})
    if known is None and not Path(name).exists() and "/" not in name and name != "demo":
        names = [str(told["name"]) for told in baselines(store)]
        near = nearest(name, names)
        if near:
            raise UsageError(f"There is no baseline {name!r}. Did you mean {near!r}? Stored: {', '.join(names)}.")
    return known


def gate(job: Job, student: str, baseline: str, asked: Asked) -> dict[str, Any]:
    """Whether a student loses no more than the margins on every set, each with 95% confidence.

    Every set must pass, so that no correction for several tests is due (Berger 1982, the intersection-union test).
    """
    stored = baseline_of(job.store, baseline)
    if stored is not None:
        job = replace(job, recipe=job.recipe.model_copy(update=stored["text"]))
    mine = measured(job, student, asked)
    if stored is not None:
        theirs, fingerprint = _stored(job, stored, mine), stored["fingerprint"]
    else:
        other = measured(job, baseline, asked)
        theirs, fingerprint = _fresh(other, mine), other.teacher.fingerprint
    same = fingerprint == mine.teacher.fingerprint
    checks = []
    for source, result in mine.results.items():
        kind = "perplexity" if result.name == "perplexity" else "accuracy"
        margin = Margin.parse(f"{asked.percent}%ppl" if kind == "perplexity" else f"{asked.points}pp:{source}")
        kept = margin.judge(theirs[source], result, job.recipe.seed, same=same)
        lost = kept.in_units(margin.kind)
        limit = asked.percent if kind == "perplexity" else asked.points
        word = "PASS" if kept.within else "FAIL" if kept.lost.low > margin.limit else "UNDECIDED"
        checks.append({
            "set": source, "kind": kind, "score": result.name, "n": len(result.sums), "verdict": word,
            "baseline": _shown(theirs[source]), "student": _shown(result), "lost": lost.value,
            "low": lost.low, "high": lost.high, "margin": limit, "reliable": lost.reliable, "note": lost.note,
        })  # fmt: skip
    return {
        "verdict": min((check["verdict"] for check in checks), key=WORDS.index),
        "student": mine.teacher.name,
        "baseline": baseline,
        "checks": checks,
        "seen": {mine.teacher.name: list(mine.seen)} if mine.seen else {},
        "environment": asdict(proof.environment(str(mine.teacher.device))),
    }


def _stored(job: Job, told: Mapping[str, Any], mine: Side) -> dict[str, EvalResult]:
    """What a baseline got, which is not measured again. Raises FingerprintError if the student has other items."""
    found = {}
    for source, result in mine.results.items():
        kept = job.store.evaluation(told["fingerprint"], Plan(), result.name, result.tokens, told["compute"])
        if kept is None:
            raise FingerprintError(
                f"{source} gives {mine.teacher.name} other tokens than the baseline {told['name']} was measured on: "
                "the file has changed, or the tokenizer is another one. Save a new baseline."
            )
        found[source] = kept
    return found


def _fresh(theirs: Side, mine: Side) -> dict[str, EvalResult]:
    """What another model got on the student's items."""
    found = {}
    for source, own in mine.results.items():
        result = theirs.results[source]
        if result.tokens != own.tokens:
            if mine.sets[source].kind == "text":
                raise FingerprintError(
                    f"{mine.teacher.name} and {theirs.teacher.name} have different tokenizers, so their perplexities "
                    f"on {source} do not pair. Gate on --tasks alone: --data ''."
                )
            result = replace(result, tokens=own.tokens)
        found[source] = result
    return found


def _shown(result: EvalResult) -> float:
    """Perplexity, or accuracy."""
    return exp(result.mean) if result.name == "perplexity" else result.mean


def write_junit(told: Mapping[str, Any], path: Path) -> None:
    """A gate as JUnit XML, a test case a set: what continuous integration shows. Written aside and renamed."""
    checks = told["checks"]
    failed = sum(check["verdict"] != "PASS" for check in checks)
    suite = ET.Element("testsuite", name="billhook gate", tests=str(len(checks)), failures=str(failed))
    for check in checks:
        case = ET.SubElement(
            suite, "testcase", classname=str(told["student"]), name=f"{check['set']} ({check['score']})"
        )
        if check["verdict"] != "PASS":
            failure = ET.SubElement(case, "failure", type=check["verdict"], message=in_words(check))
            failure.text = in_words(check)
        ET.SubElement(case, "system-out").text = in_words(check)
    aside = path.with_name(f".{path.name}.partial")
    ET.ElementTree(suite).write(aside, encoding="utf-8", xml_declaration=True)
    aside.rename(path)


def in_words(check: Mapping[str, Any]) -> str:
    """`loses 1.20 pp (one-sided 95%: 0.10 to 2.40); 1 may go`."""
    unit = "% of perplexity" if check["kind"] == "perplexity" else "pp"
    verb = "loses" if check["lost"] >= 0 else "gains"
    return (
        f"{verb} {abs(check['lost']):.2f} {unit} ({BOUND}: {check['low']:.2f} to {check['high']:.2f}); "
        f"{check['margin']:g} may go"
    )
