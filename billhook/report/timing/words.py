"""Measured speed as words."""

from __future__ import annotations

from billhook.core.results.measured import Estimate
from billhook.core.results.model import SpeedReport
from billhook.report.numbers import format_number, format_ratio, join_words, printable, reliability_note, with_interval
from billhook.report.study_words import short_names


def speed_columns(report: SpeedReport) -> tuple[str, ...]:
    """Return the heads of `speed_rows`: the KV cache where a runtime served the models."""
    return ("model", "prefill tok/s", "decode tok/s", "peak memory", *(("KV cache",) if report.runtime else ()))


def speed_rows(report: SpeedReport) -> list[tuple[str, ...]]:
    """Return a row for each model: medians with their intervals, and bytes."""
    names = short_names(each.model for each in report.models)
    rows = []
    for each in report.models:
        rates = each.rates
        speeds = (rates.prefill_tokens_per_s, rates.decode_tokens_per_s)
        peak = format_number(float(rates.peak_bytes), "B") if rates.peak_bytes else "not measured"
        cache = format_number(each.kv_bytes, "B") if each.kv_bytes else "not told"
        cells = (names[each.model], *map(_rate, speeds), peak, *((cache,) if report.runtime else ()))
        rows.append(cells)
    return rows


def _rate(found: Estimate) -> str:
    return f"{found.value:,.1f} ({found.low:,.1f}–{found.high:,.1f})"


def ratio_words(report: SpeedReport) -> str:
    """Return how many times faster the second model is; empty of one model."""
    if report.ratio is None:
        return ""
    phases = (("prefill", report.ratio.prefill), ("decode", report.ratio.decode))
    return ", ".join(f"{name} {with_interval(found, format_ratio)}" for name, found in phases)


def speed_headline(report: SpeedReport) -> str:
    """Return what was found, in a sentence."""
    names = short_names(each.model for each in report.models)
    first, last = (printable(names[report.models[i].model]) for i in (0, -1))
    if report.ratio is None:
        rate = report.models[0].rates.decode_tokens_per_s
        return f"{first} decodes {with_interval(rate)} tokens per second."
    return f"{last} against {first}: {ratio_words(report)} as fast."


def speed_notes(report: SpeedReport) -> list[str]:
    """Return what the weights alone promise, how it was measured, and what an interval is worth."""
    notes = []
    if report.predicted is not None:
        phases = (("prefill", report.predicted.prefill), ("decode", report.predicted.decode))
        told = ", ".join(f"{name} {format_ratio(times)}" for name, times in phases)
        notes.append(f"By their weights alone it would be: {told}.")
    p, where = report.protocol, ", ".join(filter(None, (report.runtime, report.environment.machine)))
    notes.append(
        f"{p.repeats} runs after a warm-up, batch {p.batch}, {p.prompt_tokens} tokens in, {p.new_tokens} out, {where}; "
        "median (95% interval of the median)"
    )
    notes += energy_words(report)
    rest = reliability_note(report.models[0].rates.decode_tokens_per_s)
    return [*notes, rest] if rest else notes


def energy_words(report: SpeedReport) -> list[str]:
    """Return the energy per token of each model, by which counters, or that nothing counts it."""
    energy, found = report.energy, []
    if energy is None:
        return []
    if not energy.read:
        if energy.unreadable:
            names = join_words(energy.unreadable)
            return [f"Only the administrator of this machine may read its energy counters ({names})."]
        return ["No energy counter on this machine."]
    shown = short_names(each.model for each in report.models)
    for each in report.models:
        phases = (("decoded", each.rates.decode_joules), ("of the prompt", each.rates.prefill_joules))
        told = [f"{_joules(joules)} per token {phase}" for phase, joules in phases if joules is not None]
        found += [f"{printable(shown[each.model])}: {', '.join(told)}."] if told else []
    if report.ratio is not None and report.ratio.decode_joules is not None:
        found.append(f"Energy per decoded token: {with_interval(report.ratio.decode_joules, format_ratio)}.")
    counters = f"Energy is that of the whole {join_words(energy.read)}, whoever uses it; mean (95% interval)."
    return [*found, counters] if found else ["The energy counters did not move: the runs were too short."]


def _joules(found: Estimate) -> str:
    return with_interval(found, lambda x: f"{x:.3g}").replace(" (", " J (")
