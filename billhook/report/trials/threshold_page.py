"""A threshold as one self-contained HTML page: what every step loses, where the margin is, and what was confirmed.

Nothing is measured here: every number comes from the result.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from fractions import Fraction
from html import escape
from pathlib import PurePath

from billhook.core.margin import BOUND, Margin
from billhook.core.results.studies import MarginLoss, ThresholdResult
from billhook.report.charts import Axis, Line, Point, figure, key_of, xy_chart
from billhook.report.frame import Section, caption, page_html, stacked_table
from billhook.report.numbers import pluralize, printable, reliability_note
from billhook.report.pages import page

FAR = 5  # times the margin, beyond which trials are drawn at the edge
MOST_PLAN = 2000  # characters that a command spells out; a longer plan is read from the result beside the page


def threshold_headline(result: ThresholdResult) -> str:
    """The whole in one sentence."""
    margins = " and ".join(map(printable, result.margins))
    if not result.step:
        return f"No step of {result.steps} stays within {margins}: nothing can be removed."
    losses = "; ".join(
        f"{_minus(each.lost.value)} {unit_of(each.margin)} ({BOUND}: {_minus(each.lost.low)} to "
        f"{_minus(each.lost.high)})"
        for each in result.test
    )
    word = "confirmed" if result.confirmed else "NOT CONFIRMED"
    return (
        f"{_sites_words(result)} within {margins}, {result.share:.1%} of the parameters: step {result.step} of "
        f"{result.steps}. On test items that no choice has seen it loses {losses}: {word}."
    )


def _sites_words(result: ThresholdResult) -> str:
    """How many sites can be removed whole, and how many can be narrowed, where there are any."""
    plan = result.plan
    narrowed = f" and {len(plan.narrowed)} narrowed" if plan.narrowed else ""
    return f"{pluralize(len(plan.removed), 'site')} can be removed{narrowed}"


def command(result: ThresholdResult) -> str:
    """The command that prunes so, quoted for a shell; empty where there is nothing to prune."""
    plan = ",".join(result.plan.to_list())
    if len(plan) > MOST_PLAN:
        plan = str(PurePath(result.page).with_name("result.json"))
    return f"billhook prune {shlex.quote(printable(result.model))} --plan {shlex.quote(plan)}" if plan else ""


def _minus(x: float) -> str:
    return f"{x:.2f}".replace("-", "−")


def unit_of(margin: Margin) -> str:
    """Percent of perplexity, or percentage points."""
    return "% of perplexity" if margin.kind == "ppl" else "pp of accuracy"


def _short_unit(margin: Margin) -> str:
    return "% ppl" if margin.kind == "ppl" else " pp"


def trial_rows(result: ThresholdResult) -> list[tuple[str, ...]]:
    """(step, share removed, margin, lost, at most, within) of every trial on validation items, with units."""
    return [
        (
            f"{trial.step} of {result.steps}", f"{trial.share:.1%}", printable(each.margin),
            *(f"{_minus(x)}{_short_unit(each.margin)}" for x in (each.lost.value, each.lost.high)),
            "within" if each.within else "too much",
        )
        for trial in result.trials
        for each in trial.losses
    ]  # fmt: skip


TRIAL_COLUMNS = ("Step", "Removed", "Margin", "Loses", f"At most ({BOUND})", "Verdict")


def knee_words(result: ThresholdResult) -> str:
    """Where the curve bends, in a sentence."""
    knee = result.knee
    if knee is None:
        return "The curve of the loss has no knee."
    return f"The curve of the loss bends most after step {knee + 1}, with {result.shares[knee + 1]:.1%} removed."


@page(ThresholdResult)
def threshold_page(result: ThresholdResult) -> str:
    """The page of one threshold."""
    made = f"Billhook · threshold · {result.environment.machine}"
    notes, sections = threshold_notes(result), threshold_sections(result)
    return page_html(threshold_title(result), made, threshold_headline(result), notes, sections)


def threshold_title(result: ThresholdResult) -> str:
    """The heading of the page."""
    return f"{printable(result.model)}: how much can be removed"


def threshold_sections(result: ThresholdResult) -> list[Section]:
    """The command, every margin along the steps, the loss along the steps, and the trials."""
    trials = stacked_table(TRIAL_COLUMNS, [[escape(cell) for cell in row] for row in trial_rows(result)])
    words = "Loses, at most: percent of perplexity, or percentage points (pp) of accuracy, on validation items."
    margins = "".join(_margin_chart(result, i) for i in range(len(result.margins)))
    sections = [
        Section("next", "What next", _next(result)),
        Section("margins", "What is removed, and what it costs", margins),
        Section("losses", "Loss along the steps", _loss_chart(result)),
        Section("trials", "Trials on validation items", trials + caption(words)),
    ]
    return [section for section in sections if section.html]


def threshold_notes(result: ThresholdResult) -> list[str]:
    """What a reader must know."""
    return [note for each in result.test if (note := reliability_note(each.lost))]


def _next(result: ThresholdResult) -> str:
    prune, model = command(result), shlex.quote(printable(result.model))
    if not prune:
        loose = " ".join(f"--margin {shlex.quote(_looser(margin))}" for margin in result.margins)
        words, prune = "Nothing stays within. Allow more:", f"billhook threshold {model} {loose}"
    else:
        words = "Prune so:" if result.confirmed else "Test items did not confirm this. Ask for a smaller margin, or:"
    return f'<p class="plain">{words}</p><pre>{escape(prune)}</pre>'


def _looser(margin: Margin) -> str:
    amount = min(2 * margin.amount, Fraction(100)) if margin.kind == "pp" else 2 * margin.amount
    return printable(replace(margin, amount=amount))


def _margin_chart(result: ThresholdResult, number: int) -> str:
    """What the trials lose under one margin, with their intervals, the margin, and the proof of what was chosen."""
    unit = unit_of(result.margins[number])
    trials = [(trial.step, trial.share, trial.losses[number]) for trial in result.trials]
    proof = [(result.step, result.share, each) for each in result.test[number : number + 1]]
    lines = [
        Line("validation items", tuple(_point(*each, result.steps, unit) for each in trials), "--blue", joined=True),
        Line("test items", tuple(_point(*each, result.steps, unit) for each in proof), "--orange", "diamond", shift=6),
    ]
    limit, far = trials[0][2].limit, FAR * trials[0][2].limit
    beyond = sum(each.lost.value > far > 0 for _, _, each in trials)
    lines = [replace(line, points=tuple(_at_most(point, far) for point in line.points)) for line in lines]
    name = printable(result.margins[number])
    above = f"; arrows: {pluralize(beyond, 'trial')} above {far:g}" if beyond else ""
    y = Axis(f"loses, {unit}{above}", "number", high=far if beyond else None)
    x = Axis("% of the parameters removed", "percent", zero=True)
    option = xy_chart(lines, x, y, marks={f"margin {limit:g}": limit})
    text = (
        "Blue: steps on validation items; orange: the chosen one on test items, which no choice has seen. Whiskers end "
        f"at their lower and upper bounds ({BOUND} each); dotted: the margin."
    )
    return figure(option, title=name, label=f"{name}: {text}", caption=text, key=key_of(lines))


def _point(step: int, share: float, each: MarginLoss, steps: int, unit: str) -> Point:
    lost = each.lost
    tip = (
        f"step {step} of {steps}, {share:.1%} removed\nloses {_minus(lost.value)} {unit}\n{_minus(lost.low)} to "
        f"{_minus(lost.high)} ({BOUND})\n{'within' if each.within else 'too much'}"
    )
    return Point.of(100 * share, lost, tip, hollow=not each.within)


def _at_most(point: Point, most: float) -> Point:
    """A point far above the margin as an arrow at the edge."""
    if not point.value > most > 0:
        return point
    return replace(point, value=most, low=None, high=None, symbol="arrow", hollow=False)


def _step_point(result: ThresholdResult, step: int) -> Point:
    """One step of the path, counted from 0: the knee is hollow, the chosen one blue."""
    chosen, knee = step == result.step - 1, step == result.knee
    marks = "".join(f", {word}" for word, so in (("chosen", chosen), ("knee", knee)) if so)
    share, loss = 100 * result.shares[step + 1], result.losses[step]
    tip = f"step {step + 1}{marks}\n{share:.1f}% removed\nloss {loss:.4g}"
    colour, symbol = "--blue" if chosen else "", "diamond" if marks else ""
    return Point(share, loss, tip, colour=colour, symbol=symbol, hollow=knee or None)


def _loss_chart(result: ThresholdResult) -> str:
    """The loss along the steps, its knee, and the chosen step; nothing for fewer than two steps."""
    shares = result.shares[1:]
    if len(shares) < 2:
        return ""
    points = tuple(_step_point(result, step) for step in range(len(shares)))
    option = xy_chart([Line("loss", points, joined=True)], Axis("% of the parameters removed", "percent", zero=True),
                      Axis(f"loss ({printable(result.loss)})", "nats", zero=True))  # fmt: skip
    chosen = f" Blue diamond: the chosen step, {result.step}." if result.step else ""
    text = (
        f"{knee_words(result)} Hollow diamond: the knee.{chosen} These losses chose the order; they have no interval."
    )
    return figure(option, title="", label=f"Loss along {len(points)} steps. {knee_words(result)}", caption=text)
