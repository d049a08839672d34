"""Tables of runs in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from billhook.cli.study_tables import empty_table, plain_table


def result_table(console: Console, value: dict[str, Any]) -> None:
    """Print what a pruning removed and what that changed."""
    from billhook.report import run_words

    removed = value["plan"]["removed"]
    names = f": {', '.join(removed)}" if removed else ""
    console.print(f"Removed {len(removed)} of {len(value['anatomy']['sites'])} sites{names}")
    if narrow := run_words.kept_group_texts(value):
        console.print(run_words.kept_groups_sentence(narrow))
    table = empty_table("", "teacher", "student", "change")
    for row in run_words.summary_rows(value):
        table.add_row(row.label, row.teacher, row.student, row.change)
    console.print(table)
    for note in filter(None, (value["search"]["told"], *run_words.run_notes(value))):
        console.print(note, style="dim")
    console.print(f"Checkpoint and report: {value['out']} (open {value['out']}/report.html)")


def anatomy_table(console: Console, value: dict[str, Any]) -> None:
    """Print the sites of a model and their sizes."""
    console.print(f"{value['model']}: {value['type']}, {value['blocks']} blocks, {value['dtype']}")
    table = empty_table("site", "parameters", "bytes", "KV B/token", "FLOPs/token", "groups")
    rows = [*value["sites"], {"site": "the rest", **value["rest"]}, {"site": "total", **value["total"]}]
    for row in rows:
        numbers = (row["parameters"], row["bytes"], row["kv_bytes_per_token"], row["flops_per_token"])
        table.add_row(row["site"], *(f"{n:,}" for n in numbers), f"{row['groups']:,}" if row.get("groups") else "")
    console.print(table)
    if value["already_removed"]:
        console.print(f"Removed before: {', '.join(value['already_removed'])}")


def plan_of_work_table(console: Console, value: dict[str, Any]) -> None:
    """Print what a pruning would measure, and what it would take."""
    table = empty_table("", "")
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


def evaluation_table(console: Console, value: dict[str, Any]) -> None:
    """Print a perplexity with its interval."""
    low, high = value["ci95"]
    console.print(
        f"{value['model']}: perplexity {value['perplexity']:.3f} (95% interval {low:.3f} to {high:.3f}; "
        f"{value['n']} documents of {value['clusters']} texts, {value['data']['tokens']:,} tokens of "
        f"{value['data']['source']})"
    )
    console.print(f"{value['bits_per_byte']:.4f} bits a byte, perplexity of a word {value['word_perplexity']:,.2f}")
    if value["note"]:
        console.print(value["note"], style="dim")


def speed_table(console: Console, value: dict[str, Any]) -> None:
    """Print tokens per second and peak memory."""
    table = empty_table("model", "prefill tok/s", "decode tok/s", "peak memory")
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


def runs_table(console: Console, value: dict[str, Any]) -> None:
    """Print the runs of a store, a line each."""
    table = empty_table("run", "kind", "state", "model", "remove", "search", "losses", "out")
    for row in value["runs"]:
        cells = [row[k] for k in ("run", "kind", "state", "model", "remove", "search")]
        table.add_row(*(str(cell or "–") for cell in cells), f"{row['losses']:,}", row["out"])
    console.print(table if value["runs"] else "No runs yet. Start one: billhook prune --remove 25%sites")


def methods_table(console: Console, value: dict[str, Any]) -> None:
    """Print every registered method with its options and source."""
    for row in value["methods"]:
        console.print(f"{row['name']} ({row['family']}): {row['summary']}", highlight=False, style="bold")
        options = ", ".join(f"{name}={default}" for name, default in row["options"].items())
        for text in (row["cost"] and f"Cost: {row['cost']}", options and f"Options: {options}", row["source"]):
            if text:
                console.print(f"    {text}", style="dim", highlight=False)


def recipe_table(console: Console, value: dict[str, Any]) -> None:
    """Print every built-in recipe with what it makes, what it does and its paper."""
    for row in value["recipes"]:
        makes = "depth and width" if row["makes"] == "both" else row["makes"]
        trains = ", trains" if row["trains"] else ""
        head = f"{row['name']} ({makes}, {row['checkpoint']} type{trains}, {row['remove']}): {row['summary']}"
        console.print(head, highlight=False, style="bold")
        console.print(f"    {row['paper'] or 'ours'}", style="dim", highlight=False)
    console.print("Use one: billhook prune MODEL --recipe NAME [--remove SIZE]", style="dim", highlight=False)


def score_tables(console: Console, value: dict[str, Any]) -> None:
    """Of every metric a line a block, with its sites, and a line a length for spans of blocks."""
    for metric, told in value["scores"].items():
        spread = any(row.get("se") is not None for rows in told.values() for row in rows)
        note = " (± one standard error)" if spread else ""
        console.print(f"{metric} of {value['model']}, higher = removal hurts more{note}")
        if told["sites"] or told["blocks"]:
            _by_block(console, told)
        if told["spans"]:
            _by_length(console, told["spans"])
        if told["groups"]:
            _by_group(console, told["groups"])
    data = value["data"]
    read = f", {value['bytes_read'] / 1e9:.2f} GB read from disk" if value["streamed"] else ""
    console.print(f"{data['tokens']:,} tokens of {data['source']}, {value['seconds']:.1f} s{read}", style="dim")


def evaluations(console: Console, value: dict[str, Any]) -> None:
    """A line an evaluation that was named, with its interval."""
    lines = [
        [name, f"{row['value']:#.4g}", f"{row['ci95'][0]:#.4g} to {row['ci95'][1]:#.4g}", f"{row['n']:,}", row["note"]]
        for name, row in value["evaluations"].items()
    ]
    console.print(f"{value['model']}, {value['data']['tokens']:,} tokens of {value['data']['source']}")
    console.print(plain_table(("evaluation", "value", "95% interval", "items", ""), lines))


def _by_block(console: Console, scores: dict[str, Any]) -> None:
    sites = {row["site"]: row for row in scores["sites"]}
    blocks = {row["block"]: row for row in scores["blocks"]}
    lines = []
    for position in sorted({int(name.split(".")[1]) for name in sites} | set(blocks)):
        rows = (blocks.get(position), sites.get(f"attention.{position}"), sites.get(f"mlp.{position}"))
        lines.append([str(position), *(_score(row) for row in rows)])
    console.print(plain_table(("block", "whole block", "attention", "mlp"), lines))
    if sites:
        least = sorted(scores["sites"], key=lambda row: row["value"])[:5]
        console.print(f"Least important sites: {', '.join(row['site'] for row in least)}")


def _by_length(console: Console, spans: list[dict[str, Any]]) -> None:
    """The least important span of every length."""
    lines = []
    for length in sorted({row["length"] for row in spans}):
        least = min((row for row in spans if row["length"] == length), key=lambda row: row["value"])
        lines.append([str(length), f"{least['first']}-{least['last']}", _score(least)])
    console.print(plain_table(("blocks in a span", "least important", "score"), lines))


def _by_group(console: Console, groups: list[dict[str, Any]]) -> None:
    """Of every site the spread of its channel groups, and which one matters least."""
    lines = []
    for row in groups:
        ranked = sorted(row["values"])
        spread = (ranked[0], ranked[len(ranked) // 2], ranked[-1])
        least = row["numbers"][row["values"].index(ranked[0])]
        lines.append([row["site"], f"{len(ranked):,}", *(f"{value:#.4g}" for value in spread), str(least)])
    console.print(plain_table(("site", "groups", "lowest", "middle", "highest", "lowest is"), lines))


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return "gone"
    return f"{row['value']:#.4g}" + (f" ± {row['se']:#.2g}" if row["se"] is not None else "")
