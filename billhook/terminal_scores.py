"""What a terminal shows of scores, at 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from billhook.terminal_compare import plain_table


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
