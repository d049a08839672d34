"""Forecasts and costs in words, for terminals and pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from billhook.core.outlook.costs import Figure
from billhook.core.outlook.loss_curve import LossForecast
from billhook.core.outlook.roofline import USABLE, Resources, Workload
from billhook.core.outlook.search_end import SearchForecast
from billhook.core.results.measured import Z_95
from billhook.core.results.outlook import CostReport, CurveForecast, ForecastReport, ModelOnMachine, RooflineCheck
from billhook.core.results.suggestions import Suggestion, SuggestionReport
from billhook.report.numbers import (
    format_duration,
    format_nats,
    format_number,
    format_perplexity,
    format_ratio,
    format_share,
    pluralize,
    printable,
    stem,
)

CURVE_COLUMNS = ("removed", "perplexity", "interval", "from")
RESOURCE_COLUMNS = ("model", "weights", "KV", "batch", "prefill/s", "decode/s", "J/token")


# -- perplexity ------------------------------------------------------------------------------------------------------


def curve_headline(curve: CurveForecast) -> str:
    """What the forecasts are of."""
    return (
        f"Perplexity on {printable(stem(curve.text))} by {printable(curve.recipe)}; the teacher's is "
        f"{format_perplexity(curve.teacher)}."
    )


def curve_rows(curve: CurveForecast) -> list[list[str]]:
    """A line a size, measured or forecast, the smallest first."""
    rows: list[tuple[float, list[str]]] = []
    for point in curve.measured:
        ends = (math.exp(point.nats + side * Z_95 * point.se) * curve.teacher for side in (-1, 1))
        interval = " to ".join(map(format_perplexity, ends)) if point.se else "–"
        rows.append((point.share, [_size(point.share), format_perplexity(point.perplexity), interval, point.run]))
    for each in curve.forecasts:
        value, low, high = (curve.teacher * math.exp(x) for x in (each.value, each.low, each.high))
        interval = f"{format_perplexity(low)} to {format_perplexity(high)}"
        rows.append((each.share, [_size(each.share), format_perplexity(value), interval, "forecast"]))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _size(share: float) -> str:
    return f"{100 * share:.1f}%"


def curve_notes(curve: CurveForecast) -> list[str]:
    """How sure the forecasts are, and why."""
    measured = f"Measured: 95% intervals. Forecast from {pluralize(len(curve.measured), 'measured size')}"
    if not curve.forecasts:
        lost = any(point.nats > 0 for point in curve.measured)
        return [f"{measured}: {'no other size is left.' if lost else 'none lost anything that one could rest on.'}"]
    first, fewest = curve.forecasts[0], min(each.errors for each in curve.forecasts)
    return [
        f"{measured}: intervals that hold {format_share(first.level)} of such forecasts, by the errors of at least "
        f"{fewest} past ones ({first.source})."
    ]


def forecast_sentence(each: LossForecast, teacher: float) -> str:
    """`perplexity 16.8 (14.8 to 21.7 in 90% of such forecasts)`."""
    value, low, high = (format_perplexity(teacher * math.exp(x)) for x in (each.value, each.low, each.high))
    return f"perplexity {value} ({low} to {high} in {format_share(each.level)} of such forecasts)"


# -- searches --------------------------------------------------------------------------------------------------------


def search_sentences(search: SearchForecast) -> list[str]:
    """When a search will end, at which loss, and on what that rests."""
    basis = f"from {pluralize(search.traces, 'earlier search').replace('searchs', 'searches')} ({search.source})"
    if search.low is None or search.high is None:
        ends, basis = "", f"{basis}; how far off such forecasts are is not known yet"
    else:
        ends = f" ({format_duration(search.low)} to {format_duration(search.high)})"
        basis = f"{basis}, by {pluralize(search.errors, 'past forecast')}"
    lines = [f"The search takes {format_duration(search.seconds)}{ends}, {format_duration(search.left)} more: {basis}."]
    if search.loss is not None:
        known = search.loss_low is not None and search.loss_high is not None
        span = f" ({search.loss_low:.4f} to {search.loss_high:.4f})" if known else ""
        lines.append(f"It ends at a loss of about {search.loss:.4f}{span} on its calibration tokens.")
    return lines


def search_line(search: SearchForecast) -> str:
    """The same in a line for a terminal, with the ranges that past forecasts give."""
    left, ends, basis = format_duration(search.left), "", "how far off that is, is not known yet"
    if search.low is not None and search.high is not None:
        near, far = (format_duration(max(0.0, end - search.elapsed)) for end in (search.low, search.high))
        ends, basis = f" ({near} to {far})", f"ranges by {pluralize(search.errors, 'past forecast')}"
    words = f"the search has about {left} left{ends}"
    if search.loss is not None:
        known = search.loss_low is not None and search.loss_high is not None
        span = f" ({search.loss_low:.4f} to {search.loss_high:.4f})" if known else ""
        words += f", to a loss of about {search.loss:.4f}{span}"
    return f"{words}; {basis}"


# -- machines --------------------------------------------------------------------------------------------------------


def workload_sentence(workload: Workload) -> str:
    """What a machine is asked to serve."""
    bits = workload.bytes_per_parameter
    weights = "weights as in the checkpoint" if bits is None else f"weights of {8 * bits:g} bits"
    return (
        f"{pluralize(workload.batch, 'sequence')} at a time, a context of {workload.context:,} tokens, prompts of "
        f"{workload.prompt_tokens:,}, {weights}."
    )


def resource_rows(models: Sequence[ModelOnMachine]) -> list[list[str]]:
    """A line for each model; one that does not fit has no rates."""
    return [[each.label, *_resource_cells(each.resources)] for each in models]


def _resource_cells(found: Resources) -> list[str]:
    sizes = [format_number(float(found.weight_bytes), "B"), format_number(float(found.kv_cache_bytes), "B")]
    if not found.fits:
        return [*sizes, "does not fit", "–", "–", "–"]
    batch = "any" if found.largest_batch is None else f"{found.largest_batch:,}"
    energy = None if found.joules_per_token is None else float(found.joules_per_token)
    rates = (format_number(rate) for rate in (found.prefill_tokens_per_s, found.decode_tokens_per_s))
    return [*sizes, batch, *rates, format_number(energy)]


def check_sentence(check: RooflineCheck) -> str:
    """The roofline of this machine against what was measured here."""
    measured = check.measured
    times = format_ratio(check.predicted / measured.value)
    ends = f"{format_number(measured.low)}–{format_number(measured.high)}"
    return (
        f"Checked: run {check.run} decoded {format_number(measured.value)} ({ends}) tokens/s unpruned, {check.batch} "
        f"at a time, where the roofline of `here` says {format_number(check.predicted)}: {times} of what was measured."
    )


def resource_notes(report: ForecastReport) -> list[str]:
    """What the figures of machines mean, and what they leave out."""
    notes = [] if report.check is None else [check_sentence(report.check)]
    notes += [
        "At best: the slower of reading and computing at the machine's peak, without attention scores. batch: the "
        f"largest that fits in {USABLE:.0%} of the memory.",
    ]
    if any(each.resources.joules_per_token is not None for each in report.resources):
        notes.append("J/token: at the full power that the vendor states, for decoding.")
    if any(each.even for each in report.resources):
        notes.append("A size that was not pruned yet is taken evenly from all sites.")
    return notes


# -- costs -----------------------------------------------------------------------------------------------------------

COST_COLUMNS = ("model", "tokens/s", "a million tokens", "saved", "paid back, h")


def cost_rows(report: CostReport) -> list[list[str]]:
    """A line a model: rate, cost, savings and payback, each with its interval where one was measured."""
    return [
        [
            printable(each.label), _figure(each.rate), _figure(each.per_million),
            "–" if each.saved is None else _figure(each.saved, format_share),
            "–" if each.payback_hours is None else _figure(each.payback_hours, _hours),
        ]
        for each in report.costs
    ]  # fmt: skip


def cost_sentences(report: CostReport) -> list[str]:
    """What a day costs and saves, and the quality that is lost for it."""
    lines = []
    for each in report.costs:
        if each.per_day is not None and each.machines is not None:
            saved = "" if each.saved_per_day is None else f", which saves {_figure(each.saved_per_day)}"
            machines = pluralize(each.machines, "machine")
            lines.append(f"{printable(each.label)}: {_figure(each.per_day)} a day on {machines}{saved}.")
        if each.ratio is not None:
            lost = each.ratio.mapped(lambda times: times - 1)
            line = f"{printable(each.label)} loses {_figure(lost, _percent)} of perplexity"
            if each.lost_per_saved is not None:
                line += f": {_figure(each.lost_per_saved, format_number)}% for each 1% of cost saved"
            lines.append(line + ".")
        elif each.saved is not None:
            lines.append(f"{printable(each.label)}: its quality was not measured in this store.")
    return lines


def cost_notes(report: CostReport) -> list[str]:
    """How the figures were worked out, and where each comes from."""
    prices = report.prices
    served = "a machine that serves all day" if prices.tokens_per_day is None else (
        f"{format_number(prices.tokens_per_day)} tokens a day"
    )  # fmt: skip
    lines = [
        f"At {format_number(prices.per_hour)} an hour ({prices.basis}), {report.batch} at a time, for {served}. "
        f"Making the student took {format_duration(report.making_seconds)} (search and recovery) at the same price.",
        "In brackets: 95% intervals of what was measured; ∞ where a saving may be none.",
    ]
    sources = dict.fromkeys(f"{each.label}: {each.rate.source}" for each in report.costs)
    sources |= dict.fromkeys(f"quality of {each.label}: {each.ratio.source}" for each in report.costs if each.ratio)
    return [*lines, f"Sources: {'; '.join(map(printable, sources))}."]


def _figure(figure: Figure, spell: Callable[[float], str] = format_number) -> str:
    if figure.low is None or figure.high is None:
        return spell(figure.value)
    return f"{spell(figure.value)} ({spell(figure.low)}–{spell(figure.high)})"


def _hours(hours: float) -> str:
    return "never" if math.isinf(hours) else format_number(hours)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace("-", "−")


# -- suggestions -----------------------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[Any], str]] = {
    "tokens": lambda tokens: f"{tokens:,} calibration tokens so far",
    "task": lambda file: f"task {printable(stem(str(file)))}",
    "points": lambda points: f"{points:+.1f} percentage points".replace("-", "−"),
    "share": lambda share: f"the loss bends at {_size(share)} removed",
    "given up": lambda share: f"{_size(share)} less is removed",
    "target": lambda name: f"{printable(name)} refuses the student",
    "fault": lambda fault: f"because of its {printable(str(fault).replace('_', ' '))}",
    "set": lambda name: f"undecided on {printable(stem(str(name)))}",
    "more": lambda more: f"about {more:,} more items decide it",
}


def suggestion_lines(each: Suggestion) -> list[str]:
    """What it is, what it is expected to bring and take, what it rests on, and what it brought."""
    expected = [gain_words(each)]
    if each.seconds is not None:
        expected.append(f"about {format_duration(each.seconds)}, by earlier runs of this store")
    else:
        expected.append("no run of this store tells the time: add --dry-run")
    facts = [FACTS.get(name, lambda value, name=name: f"{name} {value}")(value) for name, value in each.facts.items()]
    lines = [f"{printable(each.what)}", "; ".join(expected) + "."]
    if facts:
        lines.append(f"Seen: {'; '.join(facts)}.")
    if each.found is not None:
        lines.append(found_words(each))
    return lines


def gain_words(each: Suggestion) -> str:
    """The expected gain, and its evidence."""
    gain = each.gain
    if gain is None:
        return "Gain: no evidence in this store, nor in the docs"
    if gain.n == 1:
        return f"Gain: {format_nats(gain.value)} nats per token ({gain.source})"
    ends = f"{format_nats(gain.low)} to {format_nats(gain.high)}"
    return f"Gain: {format_nats(gain.value)} nats per token ({ends}; {gain.n} measured, {gain.source})"


def found_words(each: Suggestion) -> str:
    """What a later run brought, against what was expected."""
    found = each.found
    assert found is not None
    expected = "nothing was expected" if each.gain is None else f"expected {format_nats(each.gain.value)}"
    ends = f"{format_nats(found.low)} to {format_nats(found.high)}"
    return (
        f"Tried: run {found.run} gained {format_nats(found.value)} ({ends}), {expected}; it took "
        f"{format_duration(found.seconds)}."
    )


def suggestions_note(report: SuggestionReport) -> str:
    """What a gain is, and how sure."""
    lost = "not measured" if report.nats is None else f"{format_nats(report.nats)} nats per token"
    return f"Gains are of the loss on held-out text, which is {lost}. Intervals hold 90% of what was measured."
