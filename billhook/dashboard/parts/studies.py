"""What studies found, as the parts of their pages: the same words and sections as in their reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.core.results.ab_report import AbReport
from billhook.core.results.comparisons import Comparison, GateReport
from billhook.core.results.json_form import Result
from billhook.core.results.model import SpeedReport
from billhook.core.results.monitoring import WatchResult
from billhook.core.results.studies import StabilityResult, SweepResult, ThresholdResult, TransferResult
from billhook.report.ab_page import ab_sections, ab_title
from billhook.report.ab_words import ab_headline, ab_notes
from billhook.report.compare_page import compare_sections, comparison_title, comparison_verdict
from billhook.report.compare_words import gate_notes, gate_sentence, seen_warnings
from billhook.report.frame import Section
from billhook.report.gate_page import gate_sections, gate_title
from billhook.report.monitoring.alert_words import watch_headline, watch_notes
from billhook.report.monitoring.watch_page import watch_sections, watch_title
from billhook.report.study_words import reliability_notes, stability_headline, sweep_headline, transfer_headline
from billhook.report.timing.speed_page import speed_sections, speed_title
from billhook.report.timing.words import speed_headline, speed_notes
from billhook.report.trials.stability_page import stability_sections, stability_title
from billhook.report.trials.sweep_page import sweep_sections, sweep_title
from billhook.report.trials.threshold_page import (
    threshold_headline,
    threshold_notes,
    threshold_sections,
    threshold_title,
)
from billhook.report.trials.transfer_page import transfer_sections, transfer_title


@dataclass(frozen=True, slots=True)
class Told:
    """How a class of results is told: its heading, its verdict, what a reader must know, and its sections."""

    title: Callable[[Any], str]
    verdict: Callable[[Any], str]
    notes: Callable[[Any], Sequence[str]]
    sections: Callable[[Any], list[Section]]


TOLD: dict[type[Result], Told] = {
    SweepResult: Told(sweep_title, sweep_headline, reliability_notes, sweep_sections),
    TransferResult: Told(transfer_title, transfer_headline, reliability_notes, transfer_sections),
    StabilityResult: Told(stability_title, stability_headline, lambda result: (), stability_sections),
    ThresholdResult: Told(threshold_title, threshold_headline, threshold_notes, threshold_sections),
    Comparison: Told(
        comparison_title, comparison_verdict, lambda result: seen_warnings(result.seen), compare_sections
    ),
    GateReport: Told(
        gate_title, gate_sentence, lambda result: [*seen_warnings(result.seen), *gate_notes(result)], gate_sections
    ),
    AbReport: Told(ab_title, ab_headline, ab_notes, ab_sections),
    SpeedReport: Told(speed_title, speed_headline, speed_notes, speed_sections),
    WatchResult: Told(watch_title, watch_headline, watch_notes, watch_sections),
}  # fmt: skip
