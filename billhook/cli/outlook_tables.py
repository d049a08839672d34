"""Tables of forecasts, costs and suggestions in the terminal."""

from __future__ import annotations

import shlex
from itertools import groupby

from rich.console import Console

from billhook.cli.session import foot, plain_table, prints
from billhook.core.results.outlook import CostReport, ForecastReport, MachineReport
from billhook.core.results.suggestions import SuggestionReport
from billhook.report.numbers import format_number, printable
from billhook.report.outlook import words


@prints(ForecastReport)
def forecast_tables(console: Console, report: ForecastReport) -> None:
    """The end of the search, perplexity against size, and a table for each machine."""
    of = f"{printable(report.model)}, run {report.run}" if report.run else printable(report.model)
    console.print(f"Forecast for {of}", style="bold", highlight=False)
    if report.search is not None:
        for line in words.search_sentences(report.search):
            console.print(line, highlight=False)
    if report.curve is not None:
        console.print(words.curve_headline(report.curve), highlight=False)
        console.print(plain_table(words.CURVE_COLUMNS, words.curve_rows(report.curve)))
        foot(console, "", words.curve_notes(report.curve))
    else:
        console.print("No size of this model was measured in this store: no forecast of perplexity.", style="dim")
    if report.resources:
        console.print(f"\n{words.workload_sentence(report.resources[0].resources.workload)}", highlight=False)
    for machine, models in groupby(report.resources, key=lambda each: each.resources.machine):
        held, reads = format_number(float(machine.memory_bytes), "B"), format_number(machine.bandwidth, "B/s")
        computes = format_number(machine.flops, "FLOP/s")
        console.print(f"{machine.name}: {held}, {reads}, {computes} ({machine.source})", style="bold", highlight=False)
        console.print(plain_table(words.RESOURCE_COLUMNS, words.resource_rows(list(models))))
    foot(console, "", words.resource_notes(report))


@prints(MachineReport)
def machine_table(console: Console, report: MachineReport) -> None:
    """The machine in a line."""
    here = report.machine
    figures = f"{format_number(here.bandwidth, 'B/s')}, {format_number(here.flops, 'FLOP/s')}"
    calls = format_number(here.call_seconds, "s")
    memory = format_number(float(here.memory_bytes), "B")
    console.print(f"This machine: {memory}, {figures}, {calls} a call of a site. Kept in the store as `here`.")


@prints(CostReport)
def cost_table(console: Console, report: CostReport) -> None:
    """A line a model, then a day, quality, and sources."""
    on = f" on {report.machine}" if report.machine else ""
    console.print(f"Cost of {printable(report.model)}, run {report.run}{on}", style="bold", highlight=False)
    console.print(plain_table(words.COST_COLUMNS, words.cost_rows(report)))
    for line in words.cost_sentences(report):
        console.print(line, highlight=False)
    foot(console, "", words.cost_notes(report))


@prints(SuggestionReport)
def suggestion_list(console: Console, report: SuggestionReport) -> None:
    """Every suggestion with its command, the largest expected gain first."""
    console.print(f"What to try after run {report.run} of {printable(report.model)}", style="bold", highlight=False)
    for number, each in enumerate(report.suggestions, 1):
        first, *others = words.suggestion_lines(each)
        console.print(f"\n{number}. {first}", style="bold", highlight=False)
        for line in others:
            console.print(line, highlight=False)
        console.print(printable(shlex.join(each.command)), highlight=False, soft_wrap=True)
    if not report.suggestions:
        console.print("Nothing is left that Billhook knows to try.", highlight=False)
    foot(console, "", [words.suggestions_note(report)])
