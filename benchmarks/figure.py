"""Draws docs/width.svg from what benchmarks/width.py measured. No number is typed in."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter, PercentFormatter, StrMethodFormatter

Lines = dict[str, list[dict[str, float]]]

# Okabe and Ito's colours, which people with any colour vision tell apart, and one more.
LOOKS = dict(zip(("#CC79A7", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#999933"), "^vsDoXP", strict=True))
ALIKE = 0.005  # of a value: less than the width of a line
INK = "#808080"  # to be read on white and on black
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "width", "font.family": "sans-serif", "font.size": 11,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.25,
}  # fmt: skip
PANELS = {"before": "without a recovery", "after": "with fold"}


def figure(told: Mapping[str, Any], file: Path) -> None:
    """Perplexity on the first text by the share of parameters that stays, without and with `fold`, by `lines_of`."""
    lines = lines_of(told)
    assert len(lines) <= len(LOOKS), f"{len(lines)} recipes, but colours for {len(LOOKS)}"
    with rc_context(STYLE):
        drawn = Figure(figsize=(5.2, 7.6), layout="constrained")
        for axes, (when, words) in zip(drawn.subplots(len(PANELS)), PANELS.items(), strict=True):
            for (name, points), (colour, marker) in zip(lines.items(), LOOKS.items(), strict=False):
                left, ys = zip(*((point["left"], point[when]) for point in points), strict=True)
                axes.plot(left, ys, color=colour, marker=marker, label=name, linewidth=1.8, markersize=7)
            axes.axhline(next(iter(lines.values()))[0]["dense"], color=INK, linestyle=":", label="unpruned")
            _labelled(axes, words)
        handles, names = axes.get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
        written = io.StringIO()
        drawn.savefig(
            written, format="svg", transparent=True, metadata={"Date": None, "Description": drawn_from(lines)}
        )
    file.write_text(written.getvalue(), encoding="utf-8")


def drawn_from(lines: Lines) -> str:
    """A digest of what is drawn, which the file holds: what a picture shows does not tell how old it is."""
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def lines_of(told: Mapping[str, Any]) -> Lines:
    """{recipe: its points, by what stays}, without a recipe whose line another would cover."""
    found: dict[str, list[dict[str, float]]] = {}
    for what, row in told["rows"].items():
        on = next(iter(row["on"].values()))
        point = {"left": row["parameters"] / told["whole"]} | {key: on[key] for key in ("dense", *PANELS)}
        found.setdefault(what.partition("/")[2], []).append(point)
    lines = {name: sorted(points, key=lambda point: point["left"]) for name, points in found.items()}
    return {
        name: points
        for i, (name, points) in enumerate(lines.items())
        if not any(_covered(points, earlier) for earlier in list(lines.values())[:i])
    }


def _covered(points: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> bool:
    """Whether no eye would tell two lines apart."""
    if len(points) != len(others):
        return False
    each = zip(points, others, strict=True)
    return all(isclose(point[key], other[key], rel_tol=ALIKE) for point, other in each for key in ("left", *PANELS))


def _labelled(axes: Axes, words: str) -> None:
    axes.set(title=words, xlabel="parameters that stay", ylabel="perplexity, lower is better", yscale="log")
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8) if high < 20 * low else (1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
