"""What changes of a recipe won back in benchmarks/measured, as the shares of the loss that suggestions are made of.

python benchmarks/gains.py            prints them
python benchmarks/gains.py --write    also writes the file that Billhook ships
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from billhook.core.outlook import suggestions

MEASURED = Path(__file__).parent / "measured"
SHIPPED = Path(suggestions.__file__).with_name("gains.yaml")
JOINT = "billhook-joint"


def told(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((MEASURED / f"{name}.json").read_text())
    return value


def texts(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """The outcomes on text of a row."""
    return ((name, outcome) for name, outcome in row["on"].items() if outcome["kind"] == "perplexity")


def lost(perplexity: float, dense: float) -> float:
    """Nats above the teacher."""
    return math.log(perplexity / dense)


def folded() -> list[float]:
    """Of every recipe, size and text, what fold closed."""
    return [o["closed"] for row in told("width")["rows"].values() for _, o in texts(row)]


def trained() -> list[float]:
    """What lora closed of the gap that fold had left."""
    rows = told("recovery")["rows"]
    before, after = dict(texts(rows["fold"])), dict(texts(rows["fold,lora"]))
    return [1 - lost(after[t]["after"], o["dense"]) / lost(o["after"], o["dense"]) for t, o in before.items()]


def joined() -> list[float]:
    """What the joint search loses less than the search of whole sites, by size and text."""
    rows = told("width")["rows"]
    found = []
    for name, row in rows.items():
        size, _, recipe = name.partition("/")
        if recipe == "billhook-depth":
            other = dict(texts(rows[f"{size}/{JOINT}"]))
            found += [1 - lost(other[t]["before"], o["dense"]) / lost(o["before"], o["dense"]) for t, o in texts(row)]
    return found


def own_text() -> list[float]:
    """What half a calibration of the model's own text won, by sweep and text."""
    found = []
    for sweep in (told("calibration"), *(draw["sweep"] for draw in told("mixture")["draws"])):
        trials = {trial["data"]: trial["results"] for trial in sweep["trials"]}
        for data, results in trials.items():
            for text, mixed in trials.get(f"{data}+self", {}).items():
                if mixed["kind"] == "perplexity":
                    found.append(1 - mixed["change"]["value"] / results[text]["change"]["value"])
    return found


GAINS = {
    "fold": (folded, "docs/results.md, depth against width"), "lora after fold": (trained, "docs/results.md, recovery"),
    "joint": (joined, "docs/results.md, depth against width"),
    "text of its own": (own_text, "docs/results.md, calibration text that the model writes"),
}  # fmt: skip


def shipped() -> str:
    """The file that Billhook ships."""
    found = {
        name: {"source": source, "shares": sorted(round(share, 3) for share in measure())}
        for name, (measure, source) in GAINS.items()
    }
    head = "# Shares of the loss that changes won back on the demo model, which benchmarks/gains.py --write wrote.\n"
    return head + yaml.safe_dump(found, width=118, default_flow_style=None)


def main() -> None:
    if "--write" in sys.argv:
        SHIPPED.write_text(shipped())
    for name, (measure, source) in GAINS.items():
        shares = sorted(measure())
        middle = statistics.median(shares)
        print(f"{name:16} {middle:6.1%} ({shares[0]:.1%} to {shares[-1]:.1%}), n = {len(shares)}: {source}")


if __name__ == "__main__":
    main()
