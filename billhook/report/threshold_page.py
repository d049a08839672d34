"""A threshold as one self-contained HTML page: what every step loses, where the margin is, and what was confirmed.

Nothing is measured here: every number comes from the result. The figures are SVG, drawn here.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import PurePath

from billhook.core.margin import BOUND, Margin
from billhook.core.results.studies import ThresholdResult
from billhook.report.frame import html_table, page_html, scrolling
from billhook.report.numbers import format_number, pluralize, printable, reliability_note
from billhook.report.pages import page

WIDE, TALL = 480, 280
MOST_PLAN = 2000  # characters that a command spells out; a longer plan is read from the result beside the page
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
Point = tuple[float, float]


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


def trial_rows(result: ThresholdResult) -> list[tuple[str, ...]]:
    """(step, share removed, margin, lost, at most, within) of every trial on validation items."""
    return [
        (
            f"{trial.step} of {result.steps}", f"{trial.share:.1%}", printable(each.margin),
            _minus(each.lost.value), _minus(each.lost.high), "within" if each.within else "too much",
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
    trials = scrolling(html_table(TRIAL_COLUMNS, trial_rows(result)), "Trials")
    body = [
        *(_margin_figure(result, i) for i in range(len(result.margins))),
        _loss_figure(result),
        f"<section><h2>Trials on validation items</h2>{trials}</section>",
        f"<section><h2>Plan</h2><pre>{escape(command(result) or 'nothing')}</pre></section>",
    ]
    made = f"Billhook · threshold · {result.environment.machine}"
    title = f"{printable(result.model)}: how much can be removed"
    return page_html(title, made, threshold_headline(result), threshold_notes(result), body)


def threshold_notes(result: ThresholdResult) -> list[str]:
    """What a reader must know."""
    return [note for each in result.test if (note := reliability_note(each.lost))]


def _margin_figure(result: ThresholdResult, number: int) -> str:
    """What the trials lose under one margin, with their intervals, the margin, and the proof of what was chosen."""
    trials = [(100 * trial.share, trial.losses[number]) for trial in result.trials]
    proof = [(100 * result.share, each) for each in result.test[number : number + 1]]
    limit = trials[0][1].limit
    tops = [each.lost.high for _, each in proof] + [each.lost.value for _, each in trials] + [limit]
    high = min(max(tops), 12 * limit) if limit else max(tops)
    bottom = min(0.0, *(each.lost.low for _, each in trials + proof))
    scale = _Scale((0.0, 100 * max(result.shares)), (bottom, 1.15 * high))
    drawn = [scale.frame("% of the parameters removed", unit_of(result.margins[number]))]
    drawn.append(scale.line([(0, limit), (scale.x[1], limit)], "var(--dim)", dashes="4 4"))
    for shift, colour, points in ((0, "var(--blue)", trials), (5, "var(--orange)", proof)):
        for x, each in points:
            drawn.append(scale.bar(x, (each.lost.low, each.lost.value, each.lost.high), colour, shift))
    caption = (
        "Blue: steps on validation items; orange: the chosen one on test items. Bars end at their lower and upper "
        f"bounds ({BOUND} each); dashed: the margin."
    )
    name = f"{printable(result.margins[number])}: what is removed, and what it costs"
    return f"<section><h2>{escape(name)}</h2>{_svg(drawn, name)}<p>{caption}</p></section>"


def _loss_figure(result: ThresholdResult) -> str:
    """The loss along the steps, its knee, and the chosen step."""
    points = [(100 * share, loss) for share, loss in zip(result.shares[1:], result.losses, strict=True)]
    if not points:
        return ""
    scale = _Scale((0.0, max(x for x, _ in points)), (0.0, 1.08 * max(y for _, y in points)))
    drawn = [scale.frame("% of the parameters removed", f"loss ({printable(result.loss)})")]
    drawn.append(scale.line(points, "var(--orange)"))
    drawn += [scale.dot(point, "var(--orange)") for point in points]
    for index, words in ((result.knee, "knee"), (result.step - 1, "chosen")):
        if index is not None and index >= 0:
            drawn.append(scale.mark(points[index], words))
    figure = f"{_svg(drawn, 'Loss along the steps')}<p>{knee_words(result)}</p>"
    return f"<section><h2>Loss along the steps</h2>{figure}</section>"


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDE} {TALL}" role="img" aria-label="{escape(label)}" '
        f'style="width:100%;max-width:35rem;font:13px system-ui,sans-serif">{"".join(parts)}</svg>'
    )


class _Scale:
    """From the numbers of a figure to its places."""

    def __init__(self, x: Point, y: Point) -> None:
        self.x, self.y = (x[0], max(x[1], x[0] + 1e-9)), (y[0], max(y[1], y[0] + 1e-9))

    def at(self, x: float, y: float) -> Point:
        wide, tall = WIDE - LEFT - RIGHT, TALL - TOP - BOTTOM
        y = min(max(y, self.y[0]), self.y[1])
        return (
            LEFT + wide * (x - self.x[0]) / (self.x[1] - self.x[0]),
            TOP + tall * (1 - (y - self.y[0]) / (self.y[1] - self.y[0])),
        )

    def frame(self, below: str, beside: str) -> str:
        drawn = []
        for i in range(5):
            x, y = (ends[0] + (ends[1] - ends[0]) * i / 4 for ends in (self.x, self.y))
            (px, _), (_, py) = self.at(x, self.y[0]), self.at(self.x[0], y)
            below_x = f'x="{px:.1f}" y="{TALL - BOTTOM + 16}" text-anchor="middle"'
            beside_y = f'x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end"'
            drawn.append(f'<text {below_x} fill="var(--dim)">{format_number(x)}</text>')
            drawn.append(f'<text {beside_y} fill="var(--dim)">{format_number(y)}</text>')
            drawn.append(f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" stroke="var(--line)"/>')
        drawn.append(
            f'<text x="{WIDE / 2}" y="{TALL - 8}" text-anchor="middle" fill="var(--dim)">{escape(below)}</text>'
        )
        middle = (TALL - BOTTOM) / 2
        drawn.append(
            f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle" fill="var(--dim)">'
            f"{escape(beside)}</text>"
        )
        return "".join(drawn)

    def line(self, points: Sequence[Point], colour: str, dashes: str = "") -> str:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        return (
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        )

    def dot(self, point: Point, colour: str) -> str:
        x, y = self.at(*point)
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'

    def bar(self, x: float, ends: tuple[float, float, float], colour: str, shift: float) -> str:
        (px, low), (_, middle), (_, high) = (self.at(x, y) for y in ends)
        px += shift
        return (
            f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{px:.1f}" cy="{middle:.1f}" r="4" fill="{colour}"/>'
        )

    def mark(self, point: Point, words: str) -> str:
        x, y = self.at(*point)
        anchor = "start" if x < WIDE / 2 else "end"
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="var(--ink)" stroke-width="1.5"/>'
            f'<text x="{x:.1f}" y="{y - 12:.1f}" text-anchor="{anchor}" fill="var(--ink)">{escape(words)}</text>'
        )
