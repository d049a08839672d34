"""The report: its numbers are those of the result, its page is whole, hostile strings stay strings."""

from __future__ import annotations

import base64
import html
import json
import math
import operator
import random
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import HOSTILE, OVERFLOW, Elements, Tab
from rich.console import Console
from rich.table import Table

from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.margin import Margin, MarginTrial, WithinReport
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.exports import ExportReport, TargetFit, Verification
from billhook.core.results.measured import Environment, Estimate, Step, TimingProtocol, TokenSetInfo, WorkPlan
from billhook.core.results.run import (
    Answer,
    Decided,
    ModelInfo,
    PerplexityChange,
    PredictedSpeed,
    Rates,
    RecoveryGain,
    RecoveryReport,
    RunData,
    RunReason,
    RunResult,
    SearchSummary,
    SiteLoss,
    SizeChange,
    SpeedChange,
    SpeedGap,
    SpeedRatio,
    TaskChange,
)
from billhook.report import numbers, run_report, run_words
from billhook.report.run import narrowed as narrowed_words
from billhook.report.run import use as run_use
from billhook.report.run.drawing import architecture_svg
from billhook.report.run.sites import sites_table

TARGETS = (
    TargetFit("llama.cpp", "gguf", None, True),
    TargetFit("mlx", "deci", None, True),
    TargetFit("sglang", "deci", None, False),
    TargetFit("stock", "stock", "sites", True),
    TargetFit("transformers", "transformers", None, True),
)
SITES = tuple(Site(block, part) for block in range(80) for part in PARTS)


def a_result(
    seed: int = 0, blocks: int = 30, removals: int = 15, *, gone: tuple[str, ...] = (), **more: Any
) -> RunResult:
    """A run's result with numbers of its own for every seed. `more` replaces fields."""
    rng = random.Random(seed)
    present = [site for site in SITES[: 2 * blocks] if str(site) not in gone]
    counts = {site: rng.randint(10**5, 10**6) * (1 if site.part == "attention" else 3) for site in present}
    removed = rng.sample(present, removals)
    anatomy = Anatomy("llama", blocks, tuple(
        SiteSize(site, n, 4 * n, 1536 * (site.part == "attention"), 2 * n) for site, n in counts.items()
    ), Unassigned(28_312_128, 4 * 28_312_128, 2 * 28_312_128))  # fmt: skip
    loss, steps = 0.01, []
    for site in removed:
        loss *= 1 + 6 * rng.random() / removals
        steps.append(Step((site,), loss, loss * rng.random() / 9, loss * rng.random() / 40, (), loss / 30))
    if steps:
        steps[-1] = replace(steps[-1], gap=None, gap_se=None)

    def near(x: float) -> Estimate:
        return Estimate(x, x * (1 - rng.random() / 20), x * (1 + rng.random() / 20), 9, 9, True)

    def rates(x: float, peak: int) -> Rates:
        return Rates(near(30 * x), near(x), peak)

    ratio, fast = 1 + rng.random(), 1 + rng.random() / 3
    text = TokenSetInfo("pydoc", 16384, 40, 40, 38, "bb")

    def recovery(name: str, before: float, after: float, held: float) -> RecoveryReport:
        times = after / before
        gain = RecoveryGain(20.1, before, after, Estimate(times, times * 0.97, times * 1.02, 40, 40, True),
                            (before - after) / (before - 20.1))  # fmt: skip
        on = {"calibration": gain, "held-out": replace(gain, closed=held)}
        return RecoveryReport(name, {}, 241.3, 9_216, 32_768, "pydoc", on)

    plan = Plan(frozenset(removed))
    return replace(RunResult(
        billhook="0.1.0", run="r3fa9c1", created="2026-11-22T07:00:00+00:00", out="build/demo",
        checkpoint="billhook-llama", reasons=(), anatomy=anatomy,
        already_removed=Plan.parse(gone), loss="kl", loss_unit="nats", plan=plan, seen=("d1", "d2"),
        model=ModelInfo("demo", "llama", "0123456789abcdef", blocks, "float32", "float32", "cpu"),
        recipe={"model": "demo", "remove": "25%sites", "data": "pydoc", "eval_data": None, "tokens": 512,
                "seed": seed, "loss": "kl", "search": "greedy", "protect": "", "plan": None, "stock": False},
        environment=Environment("0.1.0", "3.12.3", "2.13.0", "5.16.1", "cpu", "x86_64, 2 cores", 2),
        data=RunData(replace(text, hash="aa", tokens=512), text), steps=tuple(steps),
        search=SearchSummary("exact", Decided(full=removals), WorkPlan("layers", False, 1, 1, 10**9, 10**6, 4096), 9.5),
        within=None, tasks=(), sizes=SizeChange(anatomy.sizes(), anatomy.sizes(plan)),
        perplexity=PerplexityChange(20.1, 20.1 * ratio, Estimate(ratio, ratio * 0.96, ratio * 1.05, 40, 38, True)),
        recoveries=(recovery("fold", 60.0, 42.5, 0.42), recovery("lora", 42.5, 43.0, -0.02)),
        speed=SpeedChange(rates(30, 1_200_000_000), rates(30 * fast, 1_100_000_000),
                          SpeedRatio(near(fast + 0.02), near(fast)), PredictedSpeed(1.21, 1.13),
                          TimingProtocol(repeats=7), None),
        answers=(Answer("What is the capital of France?", "Paris.", "Paris."),) * 3,
        changed=("remove", "tokens"),
        alone=tuple(SiteLoss(site, 10 ** (-2 + 2 * rng.random()), 0.001, 512) for site in present),
        seconds={"load": 3.1, "calibrate": 1.2, "search": 400.0, "evaluate": 40.0, "speed": 30.0, "save": 8.0},
    ), **more)  # fmt: skip


def hostile(seed: int) -> RunResult:
    """A result in which every free string is an attack."""
    safe = a_result(seed, gone=("attention.4", "mlp.4", "mlp.29"))

    def attack(block: Any) -> Any:
        return replace(block, **{name: HOSTILE for name, value in asdict(block).items() if isinstance(value, str)})

    texts = (replace(info, source=HOSTILE, hash=HOSTILE) for info in (safe.data.calibration, safe.data.evaluation))
    return replace(
        safe, model=attack(safe.model), environment=attack(safe.environment), data=RunData(*texts),
        recipe={k: HOSTILE if isinstance(v, str) else v for k, v in safe.recipe.items()},
        answers=(Answer(HOSTILE, HOSTILE * 3, HOSTILE[::-1]),), out=HOSTILE, run=HOSTILE, created=HOSTILE,
        billhook=HOSTILE, loss=HOSTILE, loss_unit=HOSTILE,
    )  # fmt: skip


def number(text: str) -> float:
    """The first number of a short string, with its prefix: `120M` is 120e6."""
    found = re.search(r"([−-]?[\d.,]+) ?([kMGT]?)", text)
    assert found, text
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2]]
    return float(found[1].replace("−", "-").replace(",", "")) * scale


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rows_say_what_was_measured(seed: int) -> None:
    result = a_result(seed)
    told = {row.label: row for row in run_words.summary_rows(result)}
    sizes = {"Parameters": "parameters", "On disk": "bytes", "KV cache / token": "kv_bytes_per_token"}
    for label, key in {**sizes, "FLOPs / token": "flops_per_token"}.items():
        row, was, now = told[label], getattr(result.sizes.teacher, key), getattr(result.sizes.student, key)
        assert [number(row.teacher), number(row.student)] == pytest.approx([was, now], rel=5e-3)
        assert number(row.change) == pytest.approx(100 * (now / was - 1), abs=0.051)
    quality = told["Held-out perplexity"]
    assert number(quality.change) == pytest.approx(number(quality.student) / number(quality.teacher), rel=0.01)
    speed = result.speed
    assert speed
    for label, phase in (("Prefill tokens/s", "prefill"), ("Decode tokens/s", "decode")):
        row = told[label]
        assert number(row.teacher) == pytest.approx(getattr(speed.teacher, f"{phase}_tokens_per_s").value, rel=5e-3)
        sides = [getattr(side, f"{phase}_tokens_per_s").value for side in (speed.teacher, speed.student)]
        assert number(row.change) == pytest.approx(sides[1] / sides[0], abs=0.0051), (
            "the ratio of what stands beside it"
        )
        low, high = (float(x) for x in row.change.split("(")[1].split(")")[0].replace("×", "").split("–"))
        assert low <= number(row.change) <= high
        assert low <= getattr(speed.ratio, phase).low + 0.0051
        assert high >= getattr(speed.ratio, phase).high - 0.0051
        assert row.change.endswith(f", predicted ×{getattr(speed.predicted, phase):.2f}")


def test_recoveries_are_told_on_every_text_and_what_they_cost() -> None:
    result = a_result()
    assert run_words.recovery_rows(result) == [
        ("fold", "calibration", "60.0 → 42.5", "×0.71 (0.69–0.72)", "44% closed"),
        ("fold", "held-out", "60.0 → 42.5", "×0.71 (0.69–0.72)", "42% closed"),
        ("lora", "calibration", "42.5 → 43.0", "×1.01 (0.98–1.03)", "wider"),
        ("lora", "held-out", "42.5 → 43.0", "×1.01 (0.98–1.03)", "wider"),
    ]
    fold, lora = run_words.run_notes(result)[:2]
    assert "at inference 9,216 parameters more" in fold
    assert "DID NOT HELP" in lora
    assert "at inference nothing" in lora
    assert "| fold | held-out | 60.0 → 42.5 | ×0.71 (0.69–0.72) | 42% closed |" in run_report.model_card(result)
    told = Elements(run_report.run_page(result)).text
    assert all(cell in told for row in run_words.recovery_rows(result) for cell in row)
    assert "What recovery gave back" not in run_report.run_page(replace(result, recoveries=()))


@pytest.mark.parametrize("seed", range(3))
def test_rows_fit_a_terminal_of_80_columns(seed: int) -> None:
    table = Table("", "teacher", "student", "change")
    told = run_words.summary_rows(a_result(seed))
    for row in told:
        table.add_row(row.label, row.teacher, row.student, row.change)
    screen = Console(file=StringIO(), width=80)
    screen.print(table)
    assert isinstance(screen.file, StringIO)
    drawn = screen.file.getvalue()
    for row in told:
        for word in f"{row.label} {row.teacher} {row.student} {row.change}".split():
            assert word in drawn  # no word is broken, nothing is cut
    assert len(drawn.splitlines()) <= 2 * len(told) + 4


def test_tasks_and_margins_are_told() -> None:
    task = TaskChange("x/piqa_validation.jsonl.gz", 0.682, 0.551, Estimate(-0.131, -0.16, -0.1, 900, 900, True))
    trials = tuple(
        MarginTrial(percent, ok, Estimate(*lost, 60, 60, True))
        for percent, ok, lost in (
            (4.2, True, (1.1, 0.5, 1.9)),
            (8.9, False, (3.0, 2.0, 4.1)),
            (6.3, True, (2.05, 1.0, 2.96)),
        )
    )
    within = WithinReport(Margin.parse("3%ppl"), trials, TokenSetInfo("pydoc", 8192, 20, 20, 20, "cc"))
    result = a_result(tasks=(task,), within=within)
    (row,) = [row for row in run_words.summary_rows(result) if row.label == "Accuracy, piqa_validation"]
    assert (row.teacher, row.student, row.change) == ("68.2%", "55.1%", "−13.1pp (−16.0pp to −10.0pp)")
    (note,) = [note for note in run_words.run_notes(result) if note.startswith("Within 3%ppl")]
    assert "6.3% of the parameters can be removed, for 2.05 percent of the perplexity, at most 2.96" in note
    assert note.endswith("8.9% would lose more.")


def test_what_was_not_measured_has_no_row_and_a_note() -> None:
    skipped = a_result(perplexity=None, speed=None)
    assert [row.label for row in run_words.summary_rows(skipped)] == [
        "Parameters",
        "On disk",
        "KV cache / token",
        "FLOPs / token",
    ]
    assert run_words.run_notes(replace(skipped, recoveries=())) == [
        "Perplexity was not measured.",
        "Speed was not measured.",
    ]
    unknown = a_result()
    assert unknown.speed
    speed = replace(unknown.speed, teacher=replace(unknown.speed.teacher, peak_bytes=None))
    unknown = replace(unknown, speed=speed)
    assert run_words.summary_rows(unknown)[-1] == run_words.SummaryRow("Peak memory", "–", "1.10 GB", "–")
    unknown = replace(unknown, speed=replace(speed, student=replace(speed.student, peak_bytes=None)))
    assert run_words.summary_rows(unknown)[-1].label == "Decode tokens/s"
    for result in (skipped, unknown):
        assert "None" not in run_report.model_card(result).split("## Recipe")[0]
        assert "nan" not in run_words.headline(result)


def test_decoding_as_a_graph_has_the_eager_speed_beside_it() -> None:
    result = a_result()
    assert result.speed
    assert not any("graph" in note for note in run_words.run_notes(result))
    sides = [
        replace(side, eager_decode_tokens_per_s=Estimate(10.0 * k, 9.0 * k, 11.0 * k, 9, 9, True, ""))
        for k, side in enumerate((result.speed.teacher, result.speed.student), 1)
    ]
    speed = replace(result.speed, teacher=sides[0], student=sides[1])
    note = next(note for note in run_words.run_notes(replace(result, speed=speed)) if "graph" in note)
    assert "the teacher decodes 10" in note
    assert "the student 20" in note


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"), (7, "", "7"), (999.6, "", "1,000"), (1254.4, "", "1,254"), (9996, "", "10.0k"),
        (0.04567, "", "0.0457"), (999_999, "", "1.00M"), (134_515_008, "", "135M"), (46080, "B", "46.1 kB"),
        (1_200_000_000, "B", "1.20 GB"), (-0.00123, "", "−0.00123"), (float("inf"), "", "∞"), (None, "B", "–"),
        (20.1, "", "20.1"), (30.0, "", "30.0"), (1e300, "", "1.00e+300"), (2e-9, "", "2.00e-09"),
    ],
)  # fmt: skip
def test_short_numbers(value: float | None, unit: str, text: str) -> None:
    assert numbers.format_number(value, unit) == text


def test_seconds_and_minutes_never_reach_sixty() -> None:
    told = [numbers.format_duration(s) for s in (0.1, 59.96, 60, 400, 3599.7, 3600, 86399)]
    assert told == ["0.1 s", "1 min 0 s", "1 min 0 s", "6 min 40 s", "1 h 0 min", "1 h 0 min", "23 h 59 min"]


def test_notes_are_shown_everywhere() -> None:
    result = a_result(reasons=("zeroed", "streamed"), recoveries=())
    assert result.perplexity
    assert result.speed
    few = replace(result.perplexity.ratio, clusters=3, reliable=False, reason="few_texts")
    gap = SpeedGap(("prefill", "decode"), 1, 0.020, 0.005)
    result = replace(result, perplexity=replace(result.perplexity, ratio=few), speed=replace(result.speed, gap=gap))
    told = run_words.run_notes(result)
    assert len(told) == 3
    assert told[0].startswith("The removed sites hold zeros")
    assert "block by block" in told[0]
    assert "rests on 3 texts" in told[1]
    assert "takes 20.0 ms, of which reading the weights accounts for about 5.0 ms" in told[2]
    result = replace(result, targets=TARGETS)
    told = run_words.run_notes(result)
    assert told[-1].startswith("What serves it: ")
    assert told[-1] in run_report.model_card(result).replace("\\", "")
    assert told[-1] not in run_report.run_page(result)  # where it is a part of its own
    for note in told[:-1]:
        assert note in run_report.model_card(result).replace("\\", "")
        assert html.escape(note) in run_report.run_page(result)
    unexplained = replace(result, perplexity=PerplexityChange(20.1, 30.0, replace(few, reason="")))
    assert any("not reliable" in note for note in run_words.run_notes(unexplained))


def test_the_verdict_counts_whole_blocks() -> None:
    result = a_result(3, blocks=12, removals=0, plan=Plan.parse(["attention.4", "mlp.4", "mlp.9"]))
    assert run_words.headline(result).startswith(
        "3 of 24 sites removed (1 whole block): as many parameters as before, "
    )


# -- the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [a_result(1), hostile(2), a_result(3, perplexity=None, speed=None, steps=())])
def test_the_card_is_yaml_and_markdown(result: Any) -> None:
    card = run_report.model_card(result)
    empty, front, body = card.split("---\n", 2)
    assert empty == ""
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "transformers"
    assert meta["tags"] == ["billhook", "pruned"]
    recipe = re.findall(r"^```yaml\n(.*?)\n```$", body, re.DOTALL | re.MULTILINE)
    assert [yaml.safe_load(text) for text in recipe] == [{name: result.recipe[name] for name in result.changed}]
    old = run_report.model_card(replace(result, changed=()))  # of a report that does not say what was changed
    assert [yaml.safe_load(t) for t in re.findall(r"^```yaml\n(.*?)\n```$", old, re.DOTALL | re.MULTILINE)] == [
        result.recipe
    ]
    for row in run_words.summary_rows(result):
        assert f"| {row.label} | {row.teacher} | {row.student} | {row.change} |" in body
    assert not re.search(r"(?<!\\)<\w", re.sub(r"```.*?```", "", body, flags=re.DOTALL))  # no element gets through


def test_items_of_a_task_are_not_called_texts() -> None:
    result = a_result(1)
    task = TokenSetInfo("arc.jsonl", 900, 160, 37, 37, "dd", 37)
    result = replace(result, data=RunData(task, result.data.evaluation))
    card, page = run_report.model_card(result), run_report.run_page(result)
    assert r"- calibration: arc.jsonl, 900 tokens in 37 items" in card
    assert "tokens in 40 documents" in card
    for key, of_task, of_text in (("documents", "–", 40), ("texts", "–", 38), ("items", 37, "–")):
        assert f'<tr><th scope="row">{key}</th><td>{of_task}</td><td>{of_text}</td></tr>' in page


@pytest.mark.parametrize(
    ("kind", "reasons", "said", "unsaid"),
    [
        ("llama", (), "plain transformers loads it", "trust_remote_code"),
        ("billhook-llama", (), "trust_remote_code=True", "plain transformers loads it"),
        ("llama", ("zeroed",), "no speed-up", "trust_remote_code"),
    ],
)
def test_the_card_says_how_to_load(kind: str, reasons: tuple[RunReason, ...], said: str, unsaid: str) -> None:
    card = run_report.model_card(a_result(checkpoint=kind, reasons=reasons))
    loading = card.split("## How to load it")[1].split("## Recipe")[0]
    assert said in loading
    assert unsaid not in loading
    assert ("billhook.register()" in loading) == kind.startswith("billhook-")
    code = re.findall(r"```python\n(.*?)```", loading, re.DOTALL)
    compile(code[0], "card", "exec")


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "blocks", "removals"), [(0, 30, 15), (1, 1, 0), (2, 7, 13), (3, 80, 40)])
def test_the_map_shows_every_site_once(seed: int, blocks: int, removals: int) -> None:
    gone = ("attention.3", "mlp.3") if blocks == 80 else ()
    result = a_result(seed, blocks, removals, gone=gone)
    cells = [about for _, about in Elements(run_report.run_page(result)).found if "data-site" in about]
    every = {f"{part}.{block}" for block in range(blocks) for part in ("attention", "mlp")}
    assert len(cells) == len(every)
    assert {cell["data-site"] for cell in cells} == every
    for state, sites in (("removed", set(result.plan.names())), ("earlier", set(gone))):
        assert {cell["data-site"] for cell in cells if cell["class"] == state} == sites
    assert [cell["tabindex"] for cell in cells].count("0") == 1
    told = {cell["data-site"]: cell["aria-label"] for cell in cells}
    for number_, step in enumerate(result.steps, 1):
        label = told[str(step.sites[0])]
        assert label
        assert f"removal {number_} of {removals}" in label
        assert f"{step.loss:.4g}" in label


def test_a_given_plan_has_a_map_and_no_order() -> None:
    result = a_result(4, steps=(), speed=None, alone=())
    page = run_report.run_page(result)
    assert "given plan" in page
    assert "data-option" not in page
    assert len(page) < 150_000  # nothing to draw, no ECharts


def options_of(page: str) -> dict[str, Any]:
    """The options of the charts of a page by what their labels begin with."""
    found = [about for _, about in Elements(page).found if "data-option" in about]
    return {str(about["aria-label"]).split(" ")[0]: json.loads(str(about["data-option"])) for about in found}


def dots(option: Any, number: int = 0) -> list[Any]:
    """The points of one series of dots with whiskers."""
    return [each["value"] for each in [s for s in option["series"] if s["type"] == "@interval"][number]["data"]]


def test_the_charts_carry_the_numbers_of_the_run() -> None:
    result = a_result(5)
    assert result.speed
    drawn = options_of(run_report.run_page(result))
    speed, worth, loss, gap = drawn["Student's"], drawn["Loss"], None, drawn["How"]
    loss = json.loads(
        next(str(about["data-option"]) for _, about in Elements(run_report.run_page(result)).found
             if str(about.get("aria-label")).startswith("Loss after"))
    )  # fmt: skip
    before = result.anatomy.total("parameters")
    for number_, (x, value, *_) in enumerate(dots(loss)):
        plan = Plan(frozenset(site for step in result.steps[: number_ + 1] for site in step.sites))
        assert x == pytest.approx(100 * result.anatomy.total("parameters", plan) / before)
        assert value == result.steps[number_].loss
    band = next(s["data"] for s in loss["series"] if s["type"] == "@band")
    assert [low for _, low, _ in band] == pytest.approx([s.loss - 1.96 * (s.loss_se or 0) for s in result.steps])
    known = [step for step in result.steps if step.gap is not None]
    assert [value for _, value, *_ in dots(gap)] == [step.gap for step in known]
    errors = [high - value for _, value, _, high in dots(gap)]
    assert errors == pytest.approx([1.96 * (step.gap_se or 0) for step in known])
    measured, promised = dots(speed), dots(speed, 1)
    for phase, (_, value, low, high) in zip(("prefill", "decode"), measured, strict=True):
        sides = (getattr(side, f"{phase}_tokens_per_s").value for side in (result.speed.student, result.speed.teacher))
        assert value == pytest.approx(operator.truediv(*sides))
        ratio = getattr(result.speed.ratio, phase)
        assert (low, high) == (min(value, ratio.low), max(value, ratio.high))
    assert [x[1] for x in promised] == [1.21, 1.13]
    assert worth


def test_every_site_says_what_it_is_worth() -> None:
    result = a_result(7, blocks=6, removals=3)
    page = run_report.run_page(result)
    options = [json.loads(str(a["data-option"])) for _, a in Elements(page).found if "data-option" in a]
    worth = next(option for option in options if "without the site" in option["yAxis"]["name"])
    told = {each.site: each for each in result.alone}
    for number_, part in enumerate(PARTS):
        values = {Site(int(x), part): math.exp(value) for x, value, *_ in dots(worth, number_)}
        assert values == pytest.approx({site: each.loss for site, each in told.items() if site.part == part})
    rows = re.findall(r'<tr><th scope="row" data-sort="\d+">(\S+)</th>(.*?)</tr>', page)
    assert [name for name, _ in rows] == [str(site) for site in sorted(told)]
    for name, cells in rows:
        size = next(s for s in result.anatomy.sites if str(s.site) == name)
        assert f">{size.parameters:,}<" in cells
        assert f"{told[size.site].loss:.3g} ± " in cells


# -- what is said of widths, and the drawing ------------------------------------------------------------------------


def narrowed(kept: Mapping[int, int], blocks: int = 30, removed: tuple[str, ...] = ()) -> RunResult:
    """A result whose MLPs have ten neurons each, of which so many are kept by block."""
    result = a_result(8, blocks, 0)
    group = GroupSize(1000, 4000, 0, 2000)
    wide = {"groups": tuple(range(10)), "group": group}
    sizes = tuple(replace(s, **wide) if s.site.part == "mlp" else s for s in result.anatomy.sites)  # type: ignore[arg-type]
    plan = Plan.parse([f"mlp.{block}[0-{n - 1}]" for block, n in kept.items()] + list(removed))
    step = Step((), 0.2, None, None, tuple(plan.narrowed))
    anatomy = replace(result.anatomy, sites=sizes)
    return replace(
        result, anatomy=anatomy, plan=plan, steps=(step,), sizes=SizeChange(anatomy.sizes(), anatomy.sizes(plan))
    )


def test_equal_widths_are_one_line() -> None:
    result = narrowed(dict.fromkeys(range(30), 8))
    assert [str(kind) for kind in narrowed_words.narrowed_sites(result)] == ["all 30 MLPs: 8 of 10 neurons"]
    assert run_words.headline(result).startswith("All 30 MLPs narrowed to 8 of 10 neurons: ")
    page, card = run_report.run_page(result), run_report.model_card(result)
    assert "- narrowed: all 30 MLPs: 8 of 10 neurons" in card
    assert "0 of 60 sites removed" not in page + card
    assert page.count("all 30 MLPs: 8 of 10 neurons") == 2  # at a glance, and where all parts are told
    assert "Loss against what is left" not in page  # one step has no curve
    assert "How clear each choice was" not in page
    assert narrowed_words.narrowed_sentence(result) == "Narrowed: all 30 MLPs: 8 of 10 neurons"


def test_other_widths_are_grouped_into_ranges() -> None:
    result = narrowed({0: 5, 1: 5, 2: 5, 7: 5, 4: 8}, removed=("attention.3",))
    kinds = [str(kind) for kind in narrowed_words.narrowed_sites(result)]
    assert kinds == ["mlp of blocks 0–2, 7: 5 of 10 neurons", "mlp of block 4: 8 of 10 neurons"]
    assert run_words.headline(result).startswith("1 of 60 sites removed, 5 narrowed: ")
    assert run_words.headline(narrowed({0: 5})).startswith("1 of 60 sites narrowed, none removed: ")


@pytest.mark.parametrize("blocks", [1, 7, 30, 80])
def test_the_drawing_holds_every_site_before_and_after(blocks: int) -> None:
    result = a_result(2, blocks, min(5, blocks))
    svg = architecture_svg(result.anatomy, result.plan)
    tree = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    titles = [each.text or "" for each in tree.iter(f"{space}title")]
    for size in result.anatomy.sites:
        told = [title for title in titles if title.startswith(f"{size.site}: ")]
        assert len(told) == 2
        assert [title for title in told if "removed" in title] == told[1:] * (size.site in result.plan.removed)
    assert f"After: {numbers.format_number(result.anatomy.sizes(result.plan).parameters)} parameters" in svg
    assert "prefers-color-scheme: dark" in svg
    assert "<style>" not in architecture_svg(result.anatomy, result.plan, styled=False)


def test_the_drawing_is_filled_as_far_as_is_kept() -> None:
    result = narrowed({0: 5}, blocks=2, removed=("attention.1",))
    tree = ET.fromstring(architecture_svg(result.anatomy, result.plan))
    tall = [
        float(box.get("height", ""))
        for box in tree.iter("{http://www.w3.org/2000/svg}rect")
        if box.get("class") == "mlp"
    ]
    assert tall[2] == pytest.approx(tall[0] / 2, abs=0.01)  # of both blocks, before and after
    assert tall[3] == tall[1]
    cache = [b for b in tree.iter("{http://www.w3.org/2000/svg}rect") if b.get("class") == "kv"]
    assert len(cache) == 3  # block 1 has none after


# -- the table of sites ----------------------------------------------------------------------------------------------


def site_cells(result: RunResult) -> tuple[list[str], dict[str, list[float]]]:
    """The headings of the table of sites, and what sorts each row, by site."""
    tree = ET.fromstring(sites_table(result).split("<p class")[0].replace(" class=wrap", "").replace(" data-words", ""))
    heads = [" ".join("".join(head.itertext()).split()) for head in tree.iter("th") if head.get("scope") == "col"]
    rows = [list(row) for row in tree.iter("tr")][1:]
    return heads, {row[0].text or "": [float(cell.get("data-sort", "")) for cell in row[1:-1]] for row in rows}


@pytest.mark.parametrize("measured", [True, False])
def test_loss_per_ms_is_what_a_site_is_worth_over_the_time_it_takes(measured: bool) -> None:
    result = a_result(21, 4, 3)
    if measured:
        sites = tuple(replace(s, ns_per_token=1000 * (i + 1)) for i, s in enumerate(result.anatomy.sites))
        result = replace(result, anatomy=replace(result.anatomy, sites=sites), speed=None)
    heads, rows = site_cells(result)
    assert [heads[2], heads[4]] == [
        "Loss per ms nats per ms of a step",
        f"Time ms of a step, {'measured' if measured else 'predicted'}",
    ]
    alone = {str(each.site): each.loss for each in result.alone}
    for name, (loss, per_ms, per_million, ms, parameters, *_) in rows.items():
        assert loss == alone[name]
        assert per_ms * ms == pytest.approx(loss)
        assert per_million * parameters / 1e6 == pytest.approx(loss)
    times = [cells[3] for cells in rows.values()]
    if measured:
        assert times == [(i + 1) / 1000 for i in range(8)]
    else:  # the sites and the head share the measured step by the weights that a token uses
        assert result.speed is not None
        step = 1000 / result.speed.teacher.decode_tokens_per_s.value
        rest = result.anatomy.rest.flops_per_token / result.anatomy.total("flops_per_token")
        assert sum(times) == pytest.approx(step * (1 - rest))
    assert ("measured by removing" in sites_table(result)) == measured


def test_no_loss_per_ms_where_a_time_or_a_loss_is_not_known() -> None:
    assert "Loss per ms" not in sites_table(a_result(speed=None))
    assert "Loss per ms" not in sites_table(a_result(alone=()))
    assert "Time" in sites_table(a_result(alone=()))
    assert "Time" not in sites_table(a_result(alone=(), speed=None))
    few = a_result(alone=a_result().alone[:1])
    _, rows = site_cells(few)
    unknown = [name for name, cells in rows.items() if cells[1] == 1e308]
    assert len(unknown) == len(rows) - 1


# -- how to run it, and what next -----------------------------------------------------------------------------------


def test_a_newcomer_sees_at_once_which_parts_were_removed_and_what_to_do_next() -> None:
    result = narrowed({0: 5, 1: 5}, removed=("attention.3",))
    page = run_report.run_page(result)
    first = Elements(page.split("<main>")[0].split("<body>")[1]).text
    assert "attention of block 3; narrowed: mlp of blocks 0–1: 5 of 10 neurons." in first
    words, code = run_use.next_steps(result)[0]
    assert words in first
    assert code in first
    for place in ("parts", "next"):
        assert f'<a href="#{place}">' in page
        assert f'<section id="{place}"' in page


def test_the_page_says_how_to_run_it_and_what_was_not_verified() -> None:
    seen = Verification("mlx", "0.32", 192, 1e-6, 1e-5, 1.0, 32, 32)
    done = ExportReport("demo", "deci", "folder", "build/demo/exports/deci", ("model.safetensors",), 10, seen)
    served = a_result(exports=(done,), targets=TARGETS)
    told = {use.name: use for use in run_use.uses(served)}
    assert list(told) == ["transformers", "MLX", "SGLang", "llama.cpp"]  # exports that are there come first
    assert told["MLX"].verified
    assert "--model build/demo/exports/deci" in told["MLX"].code
    assert (told["SGLang"].verified, told["SGLang"].state) == (False, "Not verified: Billhook does not run SGLang.")
    assert told["llama.cpp"].code.splitlines()[0] == "billhook export build/demo --to gguf"
    page = Elements(run_report.run_page(served)).text
    assert "In MLX: verified" in page
    assert "In llama.cpp: not verified" in page
    assert "has no place for blocks of which one site is missing" in page
    for use in told.values():
        if use.code.startswith(("from", "import")):
            compile(use.code, use.name, "exec")


def test_only_what_differs_from_the_defaults_is_in_sight() -> None:
    page = run_report.run_page(a_result())
    shown = page.split("<h3>Recipe</h3>")[1].split("<details>")[0]
    assert html.unescape(shown).startswith('<pre>remove: "25%sites"\ntokens: 512</pre>')
    assert "search: " not in shown
    assert "search: " in html.unescape(page.split("The whole recipe")[1])
    card = run_report.model_card(a_result()).split("## Recipe")[1].split("## Data")[0]
    assert card.count("\n") < 12


def test_hostile_strings_stay_strings() -> None:
    safe, page = a_result(6, gone=("attention.4", "mlp.4", "mlp.29")), run_report.run_page(hostile(6))
    assert HOSTILE not in page
    assert html.escape(HOSTILE) in page
    ours, theirs = Elements(run_report.run_page(safe)), Elements(page)
    for tag in ("script", "img", "style", "iframe", "link", "meta"):
        assert [t for t, _ in ours.found].count(tag) == [t for t, _ in theirs.found].count(tag)
    for answer in (HOSTILE, HOSTILE * 3, HOSTILE[::-1]):
        assert answer in theirs.text  # and nothing is lost


# -- the page in a browser ---------------------------------------------------------------------------------------------


def test_no_path_of_this_machine_is_on_the_card() -> None:
    """The last names stay; a name of the Hub, an address and a relative path are none of this machine."""
    home = "/home/jo doe/secret_dir"
    info = a_result().data.calibration
    recipe = {
        "model": f"{home}/my_model",
        "data": f"{home}/a.jsonl+~/private/b.txt+self",
        "within": f"1pp:{home}/t.jsonl",
        "plan": "C:\\Users\\jo\\plan.json",
        "recover_data": "org/name",
        "about": "https://example.org/a/b",
    }
    data = RunData(replace(info, source=recipe["data"]), replace(info, source=f"{home}/c.jsonl"))
    result = a_result(recipe=recipe, data=data, model=replace(a_result().model, name=f"{home}/my_model"), out=home)
    card = run_report.model_card(result)
    assert not [part for part in ("/home", "jo doe", "secret", "private", "Users") if part in card]
    assert "# my\\_model, pruned" in card
    assert all(name in card for name in ("a.jsonl+b.txt+self", "1pp:t.jsonl", "org/name", "https://example.org/a/b"))
    assert {line for line in card.splitlines() if line.startswith("plan:")} <= {
        'plan: "plan.json"',
        'plan: "C:plan.json"',
    }


def test_what_a_terminal_would_obey_is_escaped_on_the_card(tmp_path: Path) -> None:
    name = "m\x1b[31mred\u202eback\ud800\x07"
    result = a_result(model=replace(a_result().model, name=name), recipe={"model": name})
    run_report.write_report(result, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not set(card) & set("\x1b\x07\u202e\ud800")
    assert "m\\x1b\\[31mred\\u202eback\\ud800\\x07" in card


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages as files: a usual one, a hostile one, one without charts, one of a large model."""
    folder = tmp_path_factory.mktemp("pages")
    results = {
        "usual": a_result(11, targets=TARGETS),
        "hostile": hostile(12),
        "bare": a_result(13, steps=(), perplexity=None, speed=None, alone=()),
        "large": a_result(14, blocks=80, removals=60),
    }
    for name, result in results.items():
        (folder / f"{name}.html").write_text(run_report.run_page(result), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in results}


SHOWN = """[...document.querySelectorAll('.plot')].map(box => echarts.getInstanceByDom(box).getOption().series
    .filter(s => s.type === 'custom' && s.encode.y !== 0 ? s.encode.y.length === 3 : s.type === 'custom')
    .map(s => s.data.length))"""


LOOKS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]
USUAL = [[2, 2], [30, 30], [15], [14]]  # speed, worth of sites, loss, gaps
VIEWS = [("usual", USUAL, *look) for look in LOOKS]
VIEWS += [("hostile", [[2, 2], [29, 28], [15], [14]], *look) for look in LOOKS]
VIEWS += [("large", [[2, 2], [80, 80], [60], [59]], *look) for look in LOOKS[::3]]
VIEWS += [("bare", list[list[int]](), *look) for look in LOOKS[1:3]]


@pytest.mark.parametrize(("name", "marks", "width", "scheme"), VIEWS)
def test_the_page_in_a_browser(
    tab: Tab, paths: dict[str, Path], name: str, marks: list[list[int]], width: int, scheme: str
) -> None:
    tab.show(paths[name], width, scheme)
    assert (tab.run(SHOWN) if marks else []) == marks
    assert tab.run("innerWidth") == width
    assert tab.run(OVERFLOW) <= 0
    assert tab.run("document.title") != "owned"
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [paths[name].as_uri()]


def test_charts_follow_the_window_and_the_scheme(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 1440, "light")
    chart = "echarts.getInstanceByDom(document.querySelector('.plot'))"
    look = f"{chart}.getOption().xAxis[0].axisLabel.color"
    light, wide = tab.run(look), tab.run(f"{chart}.getWidth()")
    tab.look(390, "dark")
    until = time.monotonic() + 10
    while tab.run(f"{chart}.getWidth()") > 390:
        assert time.monotonic() < until
        assert wide > 390
    assert tab.run(look) != light
    assert tab.run(OVERFLOW) <= 0
    assert tab.complaints() == []


SAVED = """new Promise(done => {
  const make = URL.createObjectURL.bind(URL);
  URL.createObjectURL = blob => {
    const reader = new FileReader();
    reader.onload = () => done([blob.type, reader.result.split(',')[1]]);
    reader.readAsDataURL(blob);
    return make(blob);
  };
  document.querySelector('[data-save=%s]').click();
})"""
PIXELS = """(async () => {
  const image = new Image(), canvas = document.createElement('canvas');
  image.src = 'data:image/png;base64,%s';
  await image.decode();
  [canvas.width, canvas.height] = [image.width, image.height];
  const draw = canvas.getContext('2d');
  draw.drawImage(image, 0, 0);
  const all = draw.getImageData(0, 0, image.width, image.height).data, seen = new Set();
  for (let i = 0; i < all.length; i += 4) seen.add(`rgb(${all[i]}, ${all[i + 1]}, ${all[i + 2]})`);
  return [image.width, image.height, [...seen]];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_drawing_is_saved_with_the_colours_of_the_page(tab: Tab, paths: dict[str, Path], scheme: str) -> None:
    tab.show(paths["usual"], 1440, scheme)
    kind, text = tab.run(SAVED % "svg")
    tree = ET.fromstring(base64.b64decode(text))
    shown = tab.run("getComputedStyle(document.querySelector('.bh .attention')).fill")
    fills = {
        box.get("fill") for box in tree.iter("{http://www.w3.org/2000/svg}rect") if box.get("class") == "attention"
    }
    assert (kind, fills) == ("image/svg+xml", {shown})
    ground = tab.run("getComputedStyle(document.documentElement).backgroundColor")
    assert next(tree.iter("{http://www.w3.org/2000/svg}rect")).get("fill") == ground
    kind, data = tab.run(SAVED % "png")
    assert kind == "image/png"
    width, height, colours = tab.run(PIXELS % data)
    assert [width, height] == [2 * float(tree.get(side) or "") for side in ("width", "height")]
    assert {shown, ground} <= set(colours)
    assert tab.complaints() == []


def test_the_map_tells_about_its_sites(tab: Tab, paths: dict[str, Path]) -> None:
    tab.show(paths["usual"], 390, "light")
    tip = "document.querySelector('#tip').hidden ? null : document.querySelector('#tip').textContent"
    assert tab.run(tip) is None
    for block in (0, 9, 29):  # also at the edges of the screen
        tab.run(f"document.querySelector('[data-site=\"mlp.{block}\"]').focus()")
        assert tab.run(tip).startswith(f"mlp.{block}: ")
        assert tab.run("document.querySelector('#tip').getBoundingClientRect().right <= innerWidth") is True
        assert tab.run(OVERFLOW) <= 0
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}))"
    for key, site in (("ArrowLeft", "mlp.28"), ("ArrowUp", "attention.28"), ("ArrowRight", "attention.29")):
        tab.run(press % key)
        assert tab.run("document.activeElement.dataset.site") == site
    tab.run(press % "Escape")
    assert tab.run(tip) is None
