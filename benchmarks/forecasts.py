"""How well forecasts of loss cover: every recipe of benchmarks/measured, forecast by what the other recipes teach.

python benchmarks/forecasts.py            prints the table
python benchmarks/forecasts.py --write    also writes the errors that Billhook ships
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from billhook.core.outlook import loss_curve
from billhook.core.outlook.loss_curve import PLACES, LossPoint, PastError, PastErrors

MEASURED = Path(__file__).parent / "measured"
SHIPPED = Path(loss_curve.__file__).with_name("loss_errors.yaml")
SIZES = ("10", "20", "30")
SOURCE = "the recipes of benchmarks/measured"
TASKS = {  # which of the measured sizes are given, and which one is forecast
    "30% from 10%": ((0,), 2), "30% from 10% and 20%": ((0, 1), 2), "20% from 10%": ((0,), 1),
    "20% from 10% and 30%": ((0, 2), 1), "10% from 20% and 30%": ((1, 2), 0),
}  # fmt: skip
Curve = tuple[LossPoint, ...]


def curves() -> dict[str, list[Curve]]:
    """The curves of the demo model by recipe: on each text, before a recovery and after it. Equal ones are one."""
    found: dict[tuple[str, ...], list[LossPoint]] = {}
    for size in SIZES:
        told = json.loads((MEASURED / f"{size}.json").read_text())
        for trial in told["trials"]:
            share = 1 - trial["sizes"]["parameters"] / told["sizes"]["parameters"]
            for text, outcome in trial["results"].items():
                if outcome["kind"] == "perplexity":
                    change = outcome["change"]
                    point = LossPoint(share, change["value"], (change["high"] - change["low"]) / 3.92)
                    found.setdefault((trial["recipe"], text, "before"), []).append(point)
    told = json.loads((MEASURED / "width.json").read_text())
    for name, row in told["rows"].items():
        recipe = name.partition("/")[2]
        for text, outcome in row["on"].items():
            for stage in ("before", "after") if outcome["kind"] == "perplexity" else ():
                if (recipe, stage) != ("billhook-depth", "before"):  # which the sweeps above hold
                    point = LossPoint(
                        1 - row["parameters"] / told["whole"], math.log(outcome[stage] / outcome["dense"])
                    )
                    found.setdefault((recipe, text, stage), []).append(point)
    recipes: dict[str, list[Curve]] = {}
    first: dict[tuple[float, ...], str] = {}  # recipes that lead to the same plans
    for (recipe, *_), points in found.items():
        curve = tuple(sorted(points, key=lambda p: p.share))
        if first.setdefault(tuple(round(p.nats, 3) for p in curve), recipe) == recipe:
            recipes.setdefault(recipe, []).append(curve)
    return recipes


def coverage(recipes: Mapping[str, Sequence[Curve]], level: float = 0.9) -> list[dict[str, object]]:
    """For each task: how many forecasts held, and how wide they were, each made by the errors of other recipes."""
    rows = []
    errors = {name: loss_curve.past_errors(own, name) for name, own in recipes.items()}
    for task, (given, target) in TASKS.items():
        held, widths, misses = [], [], []
        for name, own in recipes.items():
            others = [past for other, past in errors.items() if other != name]
            past = PastErrors(
                {place: tuple(e for other in others for e in other.errors[place]) for place in PLACES}, 0, SOURCE
            )
            for curve in own:
                found = loss_curve.forecast([curve[i] for i in given], curve[target].share, past, level)
                held.append(found.low <= curve[target].nats <= found.high)
                widths.append(math.log(found.high / found.value))
                misses.append(math.log(curve[target].nats / found.value))
        rows.append({
            "task": task, "n": len(held), "held": sum(held), "factor": math.exp(sum(widths) / len(widths)),
            "off": math.exp(math.sqrt(sum(m * m for m in misses) / len(misses))),
        })  # fmt: skip
    return rows


def write_errors(recipes: Mapping[str, Sequence[Curve]]) -> str:
    """The errors of all recipes, as the file that Billhook ships."""
    past = loss_curve.past_errors([curve for own in recipes.values() for curve in own], SOURCE)
    told: dict[str, object] = {"source": SOURCE, "curves": past.curves}
    told |= {place: _grouped(past.errors[place]) for place in PLACES}
    head = "# Errors of forecasts of loss over their promised spread, which benchmarks/forecasts.py --write wrote.\n"
    return head + yaml.safe_dump(told, width=118, default_flow_style=None)


def _grouped(errors: Sequence[PastError]) -> list[dict[str, object]]:
    """Errors by distance, to two digits, and by whether several sizes were measured."""
    found: dict[tuple[bool, float], list[float]] = {}
    for each in errors:
        found.setdefault((each.several, round(each.distance, 2)), []).append(round(each.error, 3))
    return [{"several": key[0], "distance": key[1], "errors": sorted(found[key])} for key in sorted(found)]


def main() -> None:
    recipes = curves()
    if "--write" in sys.argv:
        SHIPPED.write_text(write_errors(recipes))
    total = held = 0
    print(f"{'forecast of the loss':24} {'forecasts':>9} {'in their 90% interval':>22} {'interval':>9} {'error':>7}")
    for row in coverage(recipes):
        n, inside = int(str(row["n"])), int(str(row["held"]))
        total, held = total + n, held + inside
        print(f"{row['task']:24} {n:9} {inside:14} ({inside / n:4.0%}) {'×/':>4}{row['factor']:.2f} {row['off']:6.2f}×")
    print(f"{'all':24} {total:9} {held:14} ({held / total:4.0%})   {len(recipes)} recipes, each by errors of others")


if __name__ == "__main__":
    main()
