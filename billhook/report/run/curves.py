"""The charts of a run: its loss against what is left, how clear each choice was, and its speed."""

from __future__ import annotations

from dataclasses import asdict

from billhook.core.plan import Plan
from billhook.core.results.measured import Z_95
from billhook.core.results.run import RunResult
from billhook.report.charts import Axis, Line, Point, figure, key_of, names_chart, xy_chart
from billhook.report.frame import readable_value
from billhook.report.numbers import format_number, format_ratio, pluralize, shown_ratio
from billhook.report.run.sites import removed_in_step
from billhook.report.run_words import summary_rows


def shares_left(result: RunResult) -> list[float]:
    """The percentage of the parameters that is left after each step of a run."""
    before, plan, shares = result.anatomy.total("parameters"), Plan(), []
    for step in result.steps:
        changed = {kept.site for kept in step.narrowed} | set(step.sites)
        narrowed = {kept for kept in plan.narrowed if kept.site not in changed} | set(step.narrowed)
        plan = Plan(plan.removed | set(step.sites), frozenset(narrowed))
        shares.append(100 * result.anatomy.total("parameters", plan) / before)
    return shares


def loss_chart(result: RunResult) -> str:
    """The loss after every removal against what is left; nothing for fewer than two steps."""
    steps, shares = result.steps, shares_left(result)
    if len(steps) < 2:
        return ""
    points = []
    for number, (step, left) in enumerate(zip(steps, shares, strict=True), 1):
        more = "" if step.loss_se is None else f" ± {format_number(Z_95 * step.loss_se)}"
        tip = f"{number}. {removed_in_step(step)}\n{left:.1f}% left\nloss {step.loss:.4g}{more}"
        half = None if step.loss_se is None else Z_95 * step.loss_se
        ends = (None, None) if half is None else (step.loss - half, step.loss + half)
        points.append(Point(left, step.loss, tip, *ends))
    line = Line("loss", tuple(points), joined=True, banded=True, size=10)
    known = any(step.loss_se is not None for step in steps)
    band = "the band is its 95% interval over documents" if known else "its interval was not recorded"
    tokens = result.data.calibration
    text = (
        f"The loss ({result.loss}, {result.loss_unit} per token, lower is better) after each removal, on the "
        f"{tokens.tokens:,} calibration tokens that chose it; {band}. The teacher is at the right edge, without loss."
    )
    x = Axis("% of the parameters left", "percent", high=100)
    y = Axis(f"loss ({result.loss}), {result.loss_unit}", "nats", zero=True)
    label = f"Loss after each of {len(steps)} removals: from {steps[0].loss:.4g} to {steps[-1].loss:.4g}."
    return figure(xy_chart([line], x, y), title="Loss against what is left", label=label, caption=text)


def gap_chart(result: RunResult) -> str:
    """How much worse the second-best choice of each step was; nothing where fewer than two have one."""
    known = [(n, step) for n, step in enumerate(result.steps, 1) if step.gap is not None and step.gap_se is not None]
    if len(known) < 2:
        return ""
    points, clear = [], 0
    for number, step in known:
        gap, error = step.gap or 0.0, Z_95 * (step.gap_se or 0.0)
        clear += gap > error
        tip = f"{number}. {removed_in_step(step)}\ngap {format_number(gap)} ± {format_number(error)}"
        points.append(Point(number, gap, tip, gap - error, gap + error, hollow=gap <= error))
    option = xy_chart([Line("gap", tuple(points), "--blue")], Axis("removal", "integer"),
                      Axis(f"gap to the second best, {result.loss_unit}", "nats"))  # fmt: skip
    text = (
        "How much worse the second-best choice was, with its 95% interval over documents. Where it reaches zero "
        f"(hollow), the choice may be noise. Clear of zero: {clear} of {pluralize(len(known), 'choice')}."
    )
    return figure(option, title="How clear each choice was", label=text, caption=text)


def speed_chart(result: RunResult) -> str:
    """Speed of the student over that of the teacher: measured with its interval, and predicted."""
    speed = result.speed
    if not speed:
        return ""
    names = ("prefill", "decode")
    measured = [
        shown_ratio(getattr(speed.teacher, rate), getattr(speed.student, rate), ratio)
        for rate, ratio in (("prefill_tokens_per_s", speed.ratio.prefill), ("decode_tokens_per_s", speed.ratio.decode))
    ]
    dots = tuple(
        Point.of(
            i,
            each,
            f"{names[i]}: measured {format_ratio(each.value)} ({format_ratio(each.low)} to {format_ratio(each.high)})",
        )
        for i, each in enumerate(measured)
    )
    promised = [speed.predicted.prefill, speed.predicted.decode]
    diamonds = tuple(Point(i, x, f"{names[i]}: predicted {format_ratio(x)}") for i, x in enumerate(promised) if x)
    lines = [Line("measured", dots), Line("predicted", diamonds, "--blue", "diamond", hollow=True)]
    rows = [row for row in summary_rows(result) if row.label.endswith("tokens/s")]
    label = "Student's speed over teacher's. " + "; ".join(f"{row.label}: {row.change}" for row in rows) + "."
    told = (f"{key.replace('_', ' ')} {readable_value(value)}" for key, value in asdict(speed.protocol).items())
    text = f"Dotted: as fast as the teacher. Whiskers: 95% intervals of pairs of runs. Protocol: {', '.join(told)}."
    option = names_chart(lines, Axis("student ÷ teacher", "ratio"), names, at=1.0)
    return figure(option, title="Speed-up", label=label, caption=text, height=190, key=key_of(lines))
