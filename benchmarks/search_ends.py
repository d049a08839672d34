"""How well the end of a search is forecast after a third of it: every search of some stores.

python benchmarks/search_ends.py STORE …            prints the table
python benchmarks/search_ends.py --write STORE …    also writes the searches that Billhook ships
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import yaml

from billhook.core.outlook import search_end
from billhook.core.outlook.search_end import SearchPoint, SearchTrace
from billhook.runs.store import Store

SHIPPED = Path(search_end.__file__).with_name("searches.yaml")
SHARES = (0.2, 1 / 3, 0.5, 0.7)
KEPT_POINTS = 24


def traces(stores: Sequence[str]) -> Iterator[tuple[str, SearchTrace]]:
    """Every search that ended, with the store that holds it."""
    for name in stores:
        with closing(Store(Path(name), read_only=True)) as store:
            for run in store.runs():
                if "model" in run.fingerprints:
                    trace = search_end.trace_of(run.spec, run.fingerprints["model"], store.events(run.id))
                    if trace is not None and trace.seconds and trace.seconds > 10 and len(trace.points) > 5:
                        yield f"{name}:{run.id}", trace


def until(trace: SearchTrace, share: float) -> SearchTrace:
    """A search as it stood after a share of its time."""
    assert trace.seconds is not None
    end = share * trace.seconds
    points = [p for p in trace.points if p.seconds <= end]
    rounds = [r for r in trace.rounds if r.seconds <= end]
    return replace(trace, points=tuple(points), rounds=tuple(rounds), seconds=None)


def thinned(points: Sequence[SearchPoint]) -> list[list[float]]:
    """Some of the points, evenly spaced, in few digits."""
    step = max(1, len(points) // KEPT_POINTS)
    kept = [*points[::step], points[-1]]
    return [[round(p.seconds, 1), round(p.counted, 3), round(p.met, 3)] for p in dict.fromkeys(kept)]


def main() -> None:
    stores = [name for name in sys.argv[1:] if name != "--write"]
    found = list(traces(stores))
    if "--write" in sys.argv:
        kinds: dict[str, SearchTrace] = {}
        for _, trace in found:
            kinds.setdefault(trace.about[1], trace)
        told = [
            {"search": kind.split()[0], "mode": kind.split()[1], "seconds": round(trace.seconds or 0, 1),
             "points": thinned(trace.points)}
            for kind, trace in sorted(kinds.items())
        ]  # fmt: skip
        head = "# Searches that ended, thinned: seconds, share of their losses, share of their budget.\n"
        head += "# benchmarks/search_ends.py --write wrote it.\n"
        source = "searches that Billhook ships"
        SHIPPED.write_text(
            head + yaml.safe_dump({"source": source, "searches": told}, default_flow_style=None, width=118)
        )
    heads = " ".join(f"{share:6.0%}" for share in SHARES)
    losses = "losses, forecast and true, after a third"
    print(f"{'search':16} {'seconds':>8}  forecast over true seconds after {heads}  {losses}")
    for name, trace in found:
        others = [other for _, other in found if other is not trace]
        ends = [search_end.search_end(until(trace, share), others) for share in SHARES]
        cells = [
            "  none" if t is None or t.source != trace.source else f"{t.seconds / (trace.seconds or 1):6.2f}"
            for t in ends
        ]
        end = ends[1]
        loss = "" if end is None or end.loss is None or trace.loss is None else f"{end.loss:.3f} {trace.loss:.3f}"
        print(f"{trace.about[1]:16} {trace.seconds or 0:8.1f} {'':33}{' '.join(cells)}  {loss} {name}")


if __name__ == "__main__":
    main()
