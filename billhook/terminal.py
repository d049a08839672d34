"""What a terminal shows: progress while it works, tables when it is done. Plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from billhook.records import Event, EventListener, ignore_events

PLAIN_SECONDS = 5.0  # without a terminal, at most one line in so many seconds


def silence_libraries(verbose: bool) -> None:
    """Keep transformers' own bars and warnings off the screen, unless asked for."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def progress(*, quiet: bool) -> tuple[EventListener, Callable[[], None]]:
    """A watcher that shows stages on stderr with rate and ETA, and how to close it."""
    if quiet:
        return ignore_events, lambda: None
    console = Console(stderr=True)
    if not console.is_terminal:
        return _plain_progress(), lambda: None
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[stage]:<9}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        transient=False,
    )
    return _Bars(bars), bars.stop


class _Bars:
    """One bar a stage; a stage that starts over (a search round) starts its bar over."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._tasks = bars, {}  # type: ignore[var-annotated]
        self._since: dict[str, tuple[float, int]] = {}
        bars.start()

    def __call__(self, event: Event) -> None:
        if event.stage not in self._tasks:
            self._tasks[event.stage] = self._bars.add_task("", stage=event.stage, rate="", note="", total=event.total)
        task = self._tasks[event.stage]
        shown = self._bars.tasks[self._bars.task_ids.index(task)]
        if event.done < shown.completed:
            self._bars.reset(task)
            self._since.pop(event.stage, None)
        start, first = self._since.setdefault(event.stage, (time.monotonic(), event.done))
        self._bars.update(
            task, completed=event.done, total=event.total, note=event.note[:60], rate=_rate(event, start, first)
        )


def _rate(event: Event, start: float, first: int) -> str:
    passed = time.monotonic() - start
    return f"{(event.done - first) / passed:.1f}/s" if passed > 1 and event.done > first else ""


def _plain_progress() -> EventListener:
    """Lines on stderr: a new stage at once, the same stage every few seconds and when it is complete."""
    last: dict[str, Any] = {"stage": "", "at": 0.0, "start": 0.0, "first": 0, "done": 0}

    def watch(event: Event) -> None:
        now = time.monotonic()
        fresh = event.stage != last["stage"]
        if fresh or event.done < last["done"]:
            last.update(stage=event.stage, start=now, first=event.done)
        last["done"] = event.done
        complete = event.total is not None and event.done == event.total
        if not fresh and not complete and now - last["at"] < PLAIN_SECONDS:
            return
        last["at"] = now
        count = f" {event.done}/{event.total}" if event.total else ""
        rate, left = _rate(event, last["start"], last["first"]), ""
        if rate and event.total:
            left = f", {(event.total - event.done) * (now - last['start']) / (event.done - last['first']):.0f} s left"
        print(f"{event.stage}{count} {event.note} {rate}{left}".rstrip(), file=sys.stderr, flush=True)

    return watch


# -- results --------------------------------------------------------------------------------------------------------


class _Tables(Console):
    """A console that leaves it to the command how a reader who has seen enough is answered; rich exits with 1."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling


def print_result(value: dict[str, Any], kind: str) -> None:
    """Print a result of a command as tables."""
    _tables()[kind](_Tables(soft_wrap=False, markup=False), value)


def _tables() -> dict[str, Callable[[Console, dict[str, Any]], None]]:
    """How a result of every kind is printed."""
    from billhook import terminal_compare, terminal_scores

    return {
        "result": _result, "anatomy": _anatomy, "plan_of_work": _plan_of_work, "evaluation": _evaluation,
        "speed": _speed, "scores": terminal_scores.score_tables,
        "evaluations": terminal_scores.evaluations, "runs": _runs, "run": _run, "methods": _methods,
        "sweep": _sweep, "trade": _trade, "stability": _stability, "compare": terminal_compare.comparison_table,
        "gate": terminal_compare.gate_table, "baselines": terminal_compare.baseline_table, "tasks": terminal_compare.task_table,
        "threshold": terminal_compare.threshold_table, "abtest": terminal_compare.ab_table,
    }  # fmt: skip


def _table(*columns: str) -> Table:
    from billhook.terminal_compare import plain_table

    return plain_table(columns, ())


def _result(console: Console, value: dict[str, Any]) -> None:
    from billhook import summary

    removed = value["plan"]["removed"]
    names = f": {', '.join(removed)}" if removed else ""
    console.print(f"Removed {len(removed)} of {len(value['anatomy']['sites'])} sites{names}")
    if narrow := summary.kept_group_texts(value):
        console.print(summary.kept_groups_sentence(narrow))
    table = _table("", "teacher", "student", "change")
    for row in summary.summary_rows(value):
        table.add_row(row.label, row.teacher, row.student, row.change)
    console.print(table)
    for note in filter(None, (value["search"]["told"], *summary.run_notes(value))):
        console.print(note, style="dim")
    console.print(f"Checkpoint and report: {value['out']} (open {value['out']}/report.html)")


def _anatomy(console: Console, value: dict[str, Any]) -> None:
    console.print(f"{value['model']}: {value['type']}, {value['blocks']} blocks, {value['dtype']}")
    table = _table("site", "parameters", "bytes", "KV B/token", "FLOPs/token", "groups")
    rows = [*value["sites"], {"site": "the rest", **value["rest"]}, {"site": "total", **value["total"]}]
    for row in rows:
        numbers = (row["parameters"], row["bytes"], row["kv_bytes_per_token"], row["flops_per_token"])
        table.add_row(row["site"], *(f"{n:,}" for n in numbers), f"{row['groups']:,}" if row.get("groups") else "")
    console.print(table)
    if value["already_removed"]:
        console.print(f"Removed before: {', '.join(value['already_removed'])}")


def _plan_of_work(console: Console, value: dict[str, Any]) -> None:
    table = _table("", "")
    calibration, held_out = value["data"]["calibration"], value["data"]["evaluation"]
    weights, kept, free = (value["memory_bytes"][k] / 1e9 for k in ("weights", "kept_for_the_search", "free"))
    seconds = value["expected_seconds"]
    most = seconds["search_at_most"]
    search = "unknown" if most is None else f"at most {most:,.0f} s"
    for label, text in (
        ("remove", f"{value['remove']} of {value['model']}"),
        ("losses to measure", "unknown" if value["losses"] is None else f"{value['losses']:,}"),
        ("calibration", f"{calibration['tokens']:,} tokens of {calibration['source']}"),
        ("held out", f"{held_out['tokens']:,} tokens of {held_out['source']}"),
        ("memory", f"{weights:.2f} GB weights, {kept:.2f} GB kept for the search, {free:.1f} GB free"),
        ("measured", value["layout"]),
        ("disk", f"at most {value['disk_bytes'] / 1e9:.2f} GB"),
        ("time", f"search {search}, evaluation {seconds['evaluate']:,.0f} s"),
    ):
        table.add_row(label, text)
    console.print(table)


def _evaluation(console: Console, value: dict[str, Any]) -> None:
    low, high = value["ci95"]
    console.print(
        f"{value['model']}: perplexity {value['perplexity']:.3f} (95% interval {low:.3f} to {high:.3f}; "
        f"{value['n']} documents of {value['clusters']} texts, {value['data']['tokens']:,} tokens of "
        f"{value['data']['source']})"
    )
    console.print(f"{value['bits_per_byte']:.4f} bits a byte, perplexity of a word {value['word_perplexity']:,.2f}")
    if value["note"]:
        console.print(value["note"], style="dim")


def _speed(console: Console, value: dict[str, Any]) -> None:
    table = _table("model", "prefill tok/s", "decode tok/s", "peak memory")
    for row in value["models"]:
        cells = [row[f"{kind}_tokens_per_s"] for kind in ("prefill", "decode")]
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else "not measured"
        table.add_row(row["model"], *(f"{c['median']:.1f} ({c['low']:.1f}–{c['high']:.1f})" for c in cells), peak)
    console.print(table)
    if "ratio" in value:
        told = (f"{k} ×{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})" for k, r in value["ratio"].items())
        console.print(f"The second is faster by: {', '.join(told)}")
    p = value["protocol"]
    console.print(
        f"{p['repeats']} runs after a warm-up, batch {p['batch']}, {p['prompt_tokens']} tokens in, {p['new_tokens']} "
        f"out, {value['environment']['machine']}; median (95% interval of the median)",
        style="dim",
    )


def _runs(console: Console, value: dict[str, Any]) -> None:
    table = _table("run", "state", "model", "remove", "search", "losses", "out")
    for row in value["runs"]:
        cells = [row[k] for k in ("run", "state", "model", "remove", "search")]
        table.add_row(*(str(cell or "–") for cell in cells), f"{row['losses']:,}", row["out"])
    console.print(table if value["runs"] else "No runs yet. Start one: billhook prune --remove 25%sites")


def _run(console: Console, value: dict[str, Any]) -> None:
    out = f", out: {value['out']}" if value["out"] else ""
    console.print(f"{value['id']}: {value['state']}, {value['losses']:,} losses measured{out}")
    for event in value["events"]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        count = f" {event['done']}/{event['total']}" if event["total"] else ""
        console.print(f"{at} {event['stage']}{count} {event['note']}", style="dim", highlight=False)
    if result := value["result"]:
        kind = result.get("laboratory", "prune")
        if set(result) <= {"laboratory", "page"}:  # stored before results were stored whole
            _foot(console, result, [])
        elif kind == "baseline":
            _tables()["baselines"](console, {"baselines": [result]})
        else:
            _tables()[{"prune": "result", "eval": "tasks"}.get(kind, kind)](console, result)


def _methods(console: Console, value: dict[str, Any]) -> None:
    for row in value["methods"]:
        console.print(f"{row['name']} ({row['family']}): {row['summary']}", highlight=False, style="bold")
        options = ", ".join(f"{name}={default}" for name, default in row["options"].items())
        for text in (row["cost"] and f"Cost: {row['cost']}", options and f"Options: {options}", row["source"]):
            if text:
                console.print(f"    {text}", style="dim", highlight=False)


# -- the laboratory -------------------------------------------------------------------------------------------------


def _sweep(console: Console, value: dict[str, Any]) -> None:
    """A table a text, the best of each size first; then the tasks, three to a table."""
    from billhook import lab_words as words
    from billhook import summary

    names, rows = words.short_names(value["teacher"]), words.sorted_rows(value)
    console.print(f"{words.printable(value['model'])}: {words.sweep_headline(value)}", highlight=False)
    for text in words.texts_of(value) if rows else ():
        teacher = value["teacher"][text]
        whole = f"{words.format_perplexity(teacher['value'])} ({words.format_interval_short(teacher, words.format_perplexity)})"
        table = _table("recipe", "left", "perplexity", "above best", "search")
        for place, alike in _places(value, words.sorted_rows(value, text)):
            table.add_row(place, style="bold")
            for row in alike:
                told, left = row["results"][text], words.fraction_kept(value, row)
                measured = f"{words.format_perplexity(told['value'])} ({words.format_interval_short(told, words.format_perplexity)})".replace(
                    " ()", ""
                )
                cells = f"{left:.1%}", measured, _above(told, alike), summary.format_duration(row["search_seconds"])
                table.add_row(f" {words.printable(row['recipe'])}", *cells)
        console.print(f"\nPerplexity on {names[text]}; the teacher's: {whole}", highlight=False)
        console.print(table)
    for some in _threes(words.tasks_of(value) if rows else []):
        table = _table("recipe", *(f"{names[task]}, %" for task in some))
        for place, alike in _places(value, rows):
            table.add_row(place, style="bold")
            for row in alike:
                table.add_row(f" {words.printable(row['recipe'])}", *(_share(row["results"][task]) for task in some))
        table.add_row("the teacher", *(_share(value["teacher"][task]) for task in some))
        console.print("\nAccuracy on tasks")
        console.print(table)
    for each in value["refused"]:
        console.print(f"Refused: {words.printable(' '.join(each[key] for key in ('recipe', 'remove', 'data', 'why')))}")
    told = "left: parameters; above best: nats, ≈ where not told apart; in brackets: 95% intervals"
    _foot(console, value, [told, *words.reliability_notes(value)])


def _above(gap: Any, alike: list[Any]) -> str:
    """How far a row is above the best of those alike, in nats."""
    from billhook import lab_words as words

    state = words.rank_label(gap["above_best"])
    far = words.format_nats(gap["above_best"]["value"]) + (" ≈" if state else "  ")
    return "–" if len(alike) == 1 else "best" if state == "best" else far


def _places(value: dict[str, Any], rows: list[Any]) -> list[tuple[str, list[Any]]]:
    """Rows by size and calibration text, which is named where there are several."""
    from billhook import lab_words as words

    datas = words.short_names(row["data"] for row in value["rows"])
    told: dict[str, list[Any]] = {}
    for row in rows:
        place = words.printable(row["remove"]) + (f", by {datas[row['data']]}" if len(datas) > 1 else "")
        told.setdefault(place, []).append(row)
    return list(told.items())


def _threes(names: list[str]) -> list[list[str]]:
    return [names[start : start + 3] for start in range(0, len(names), 3)]


def _share(interval: Any) -> str:
    from billhook import lab_words as words

    return f"{words.format_accuracy(interval['value'])} ({words.format_interval_short(interval, words.format_accuracy)})".replace(
        "%", ""
    )


def _trade(console: Console, value: dict[str, Any]) -> None:
    """Changes against the teacher and against text, in points, three tasks to a table."""
    from billhook import lab_words as words

    def cell(change: float, low: float, high: float) -> str:
        whole = words.format_interval({"low": low, "high": high}, lambda x: f"{100 * x:+.0f}".replace("-", "−"))
        return f"{words.format_points(change)} ({whole})"

    console.print(f"{words.printable(value['model'])}: {words.transfer_headline(value)}", highlight=False)
    for some in _threes(list(value["teacher"])):
        table = _table("pruned for", *map(words.printable, some))
        table.add_row("the teacher, %", *(_share(value["teacher"][task]) for task in some))
        table.add_row("against the teacher", style="bold")
        for row in value["rows"]:
            told = [row["results"][task] for task in some]
            cells = (cell(each["change"], each["change_low"], each["change_high"]) for each in told)
            table.add_row(f" {words.printable(row['pruned_for'])}", *cells)
        table.add_row("against text", style="bold")
        for row in value["rows"][1:]:
            told = [row["results"][task]["against_text"] for task in some]
            cells = (cell(each["value"], each["low"], each["high"]) for each in told)
            table.add_row(f" {words.printable(row['pruned_for'])}", *cells)
        console.print(table)
    _foot(console, value, ["in points of accuracy; in brackets: 95% intervals", *words.reliability_notes(value)])


def _stability(console: Console, value: dict[str, Any]) -> None:
    from billhook import lab_words as words

    console.print(
        f"{words.printable(value['model'])}, {value['metric']}: {words.stability_headline(value)}", highlight=False
    )
    table = _table("tokens", "sets", "rank correlation", "overlap of plans", "in all", "in some")
    for told in value["sizes"]:
        ranks, overlap, votes = told["rank_correlation"], told["overlap"], words.removal_counts(told)
        always = sum(n == told["sets"] for n in votes.values())
        cells = [
            f"{words.format_correlation(ranks['mean'])} ({words.format_interval(ranks, words.format_correlation)})"
        ]
        cells += [
            f"{words.format_share(overlap['mean'])} ({words.format_interval(overlap, words.format_share)})",
            str(always),
        ]
        table.add_row(f"{told['tokens']:,}", str(told["sets"]), *cells, str(len(votes) - always))
    console.print(table)
    _foot(console, value, ["in brackets: lowest and highest pair of sets; in all, in some: sites by plans"])


def _foot(console: Console, value: dict[str, Any], notes: list[str]) -> None:
    from billhook import lab_words

    for note in notes:
        console.print(note, style="dim", highlight=False)
    if "page" in value:
        console.print(f"Page: {lab_words.printable(value['page'])}", highlight=False, soft_wrap=True)
