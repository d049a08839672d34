"""Comparisons of models and of servers with numbers of their own for every seed, made up: what pages are shown."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from made_studies import MACHINE, PAGE, TEACHER, described, estimate

from billhook.core.margin import Margins
from billhook.core.monitoring.alerts import Alert, Observation
from billhook.core.plan import Plan
from billhook.core.results.ab_report import (
    AbReport,
    Answered,
    Completion,
    EndpointReport,
    PairedMeasure,
    PromptOutcome,
    RequestOptions,
    TextAgreement,
)
from billhook.core.results.comparisons import (
    Agreement,
    ComparedModel,
    ComparedSet,
    Comparison,
    EvalSetInfo,
    Flip,
    GateCheck,
    GateReport,
    ModelSpeed,
    PairVerdict,
    SetValue,
    SpeedPair,
    Verdict,
)
from billhook.core.results.measured import TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.core.results.monitoring import WatchResult
from billhook.core.results.run import PredictedSpeed, Rates, SpeedRatio

TEXTS = ("/data/wiki.jsonl", "/data/c4.jsonl")
TASKS = ("/tasks/arc.jsonl", "/tasks/piqa.jsonl")
VERDICTS: tuple[Verdict, ...] = ("worse", "undecided", "equivalent", "better")


def _pair(change: float, spread: float, verdict: Verdict, is_text: bool, margins: Margins) -> PairVerdict:
    around = estimate(change, change - spread, change + 1.2 * spread)
    near = estimate(change, change - 0.8 * spread, change + spread)
    margin = margins.perplexity if is_text else margins.accuracy
    more = 1234 if verdict == "undecided" else None
    flips = (None, None) if is_text else (3, 2)
    return PairVerdict(around, near, 0.01, 0.03, *flips, margin, verdict, more)


def a_comparison(
    seed: int = 0, students: int = 3, texts: tuple[str, ...] = TEXTS, tasks: tuple[str, ...] = TASKS, **changed: Any
) -> Comparison:
    """So many students against a teacher. The verdicts of the first set are all four kinds in turn."""
    rng, margins, sets = random.Random(seed), Margins(), []
    for number, source in enumerate((*texts, *tasks)):
        is_text = source in texts
        values = [
            SetValue(estimate(20.0 + i if is_text else 0.5 - 0.02 * i, 0.4, 21.5), {}) for i in range(students + 1)
        ]
        pairs = tuple(
            _pair(
                (0.02 if is_text else -0.02) * i * (1 + rng.random()),
                0.02,
                VERDICTS[(number + i) % 4],
                is_text,
                margins,
            )
            for i in range(students)
        )
        right = (True, *(i % 2 == 0 for i in range(students)))
        p = tuple((0.2, 0.5, 0.3) for _ in right)
        flips = () if is_text else tuple(
            Flip(n, f"question {n} of {source}", right, ("yes", "no", "perhaps"), 1, p) for n in range(5)
        )  # fmt: skip
        info = EvalSetInfo(source, "text" if is_text else "choices", None, described(source, None if is_text else 200))
        sets.append(ComparedSet(info, "perplexity" if is_text else "acc", 200, tuple(values), pairs, flips))
    speed = ModelSpeed(estimate(300, 290, 310), estimate(12, 11.5, 12.4), 900_000_000)
    other = ModelSpeed(estimate(340, 330, 350), estimate(14, 13.5, 14.4), 800_000_000)
    ratios = estimate(1.13, 1.1, 1.16), estimate(1.16, 1.12, 1.2)
    names = ("SmolLM2-135M", *(f"pruned/student-{10 * i + 10}-percent" for i in range(students)))
    models = tuple(
        ComparedModel(name, f"{i:016x}", Plan(), replace(TEACHER, parameters=TEACHER.parameters * (10 - i) // 10))
        for i, name in enumerate(names)
    )
    result = Comparison(
        models=models,
        sets=tuple(sets),
        margins=margins,
        agreement=(Agreement(estimate(0.1, 0.09, 0.12), estimate(0.8, 0.78, 0.82), "text", 5000),) * students,
        speed=(SpeedPair(speed, other, *ratios, 128, 32, 1, 9), *(None,) * (students - 1)),
        seen=(),
        environment=MACHINE,
        page=PAGE,
    )
    return replace(result, **changed)


def a_gate(verdict: str = "FAIL") -> GateReport:
    """A gate of a text and a task."""
    margins = Margins()
    checks = (
        GateCheck(
            "/data/wiki.jsonl", "perplexity", 40, "PASS", 20.0, 20.4, estimate(2.0, 1.4, 2.6), margins.perplexity
        ),
        GateCheck("/tasks/arc.jsonl", "acc", 200, verdict, 0.42, 0.36, estimate(6.0, 3.1, 8.9), margins.accuracy),  # type: ignore[arg-type]
    )
    return GateReport(verdict, "pruned/student", "SmolLM2-135M", checks, (), MACHINE)  # type: ignore[arg-type]


def an_ab_report(pairs: int = 40, **changed: Any) -> AbReport:
    """Two servers of which B is faster, and gives another text to every fourth prompt."""
    answers = [(Completion("Paris.", seconds=0.5), Completion("Paris." if i % 4 else "Rome.")) for i in range(pairs)]
    outcomes = tuple(PromptOutcome(i, "a" if i % 2 else "b", *both, bool(i % 4)) for i, both in enumerate(answers))
    measures = (
        PairedMeasure("latency_s", estimate(0.5, 0.45, 0.55), estimate(0.4, 0.36, 0.44), estimate(0.8, 0.75, 0.86)),
        PairedMeasure("first_token_s", estimate(0.1, 0.09, 0.11), estimate(0.1, 0.09, 0.12), estimate(1.0, 0.9, 1.12)),
        PairedMeasure("tokens_per_s", estimate(40, 38, 42), estimate(50, 47, 53), estimate(1.25, 1.2, 1.31)),
    )
    same = estimate(0.75, 0.6, 0.86)
    ends = [
        EndpointReport(f"http://127.0.0.1:800{i}/v1", name, estimate(1.0, 0.91, 1.0), {}, {}, 0, 1000)
        for i, name in enumerate(("teacher", "student"))
    ]
    report = AbReport(
        *ends, measures, pairs, "server", Answered(pairs, 0, 0, 0, math.nan), TextAgreement(same, same, same), None,
        RequestOptions(), 100.0, 30.0, outcomes, "r3fa9c1", "prompts.jsonl",
    )  # fmt: skip
    return replace(report, **changed)


def a_speed(models: int = 2, runtime: str = "") -> SpeedReport:
    """One model, or two of which the second is faster than its weights say."""
    rate = estimate(800.0, 760.0, 850.0)
    rows = tuple(ModelRates(f"models/{name}", Rates(rate, rate, 10**9), 4096) for name in "ab"[:models])
    ratio = estimate(1.3, 1.2, 1.4)
    pair = (SpeedRatio(ratio, ratio), PredictedSpeed(1.25, 1.2)) if models > 1 else (None, None)
    return SpeedReport(rows, TimingProtocol(), MACHINE, pair[0], runtime, pair[1])


def a_watch(rounds: int = 3) -> WatchResult:
    """A server that gets slower from round to round, and breaks a rule in the last."""
    seen = tuple(
        Observation(
            "latency", "answers", "x", estimate(1.0 + i, 0.9 + i, 1.2 + i), 1.7e9 + 3600 * i, against="baseline"
        )
        for i in range(rounds)
    )
    worse = Alert("slow", "warning", "latency", "answers", seen[-1].value, 1.5, "x", seen[-1].at, against="baseline")
    told = (worse,) if rounds > 1 else ()
    return WatchResult("http://127.0.0.1:8000/v1", "", "v1", "abc", rounds, 3600.0, seen, told, 0.01, "r000001")
