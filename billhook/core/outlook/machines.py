"""Machines that may run a model: how much they hold, read and compute."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import yaml

from billhook.core.errors import UnknownName, UsageError, option

GB, TERA = 10**9, 10**12
HERE = "here"  # the name under which the user's own machine is known


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine in numbers. Published ones are peaks: what a model reaches lies below.

    - `memory_bytes`: of the GPU, of unified memory, or of a CPU.
    - `bandwidth`: bytes per second of that memory.
    - `flops`: per second, of dense 16-bit matrix products; of a CPU of float32.
    - `watts`: of the whole board or chip; None where its vendor gives none.
    - `source`: the document, or the measurement, that the numbers come from.
    - `call_seconds`: that one site takes whatever its size, where it was measured; 0 of published figures.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    watts: float | None
    source: str
    call_seconds: float = 0.0


@cache
def machines() -> Mapping[str, Machine]:
    """Every machine of `machines.yaml`, by name."""
    told = yaml.safe_load(files("billhook.core.outlook").joinpath("machines.yaml").read_text(encoding="utf-8"))
    return {
        name: Machine(
            name, round(row["memory"] * GB), row["bandwidth"] * GB, row["flops"] * TERA, row.get("watts"), row["source"]
        )
        for name, row in told.items()
    }


def machine(name: str, here: Machine | None = None) -> Machine:
    """The machine of a name, such as `rtx-4090`, or `m4-max:36GB` with other memory than its row has.

    `here`: the user's own, where it was measured. Raises UnknownName with the nearest name, and UsageError for `here`
    where there is none.
    """
    wanted, _, memory = name.strip().lower().partition(":")
    key = re.sub(r"[\s_]+", "-", wanted)
    if key == HERE and here is None:
        raise UsageError(
            f"This machine was not measured yet. Measure it: billhook forecast {option('here', '')}".strip()
        )
    known = machines() if here is None else {**machines(), HERE: here}
    if key not in known:
        raise UnknownName("machine", key, sorted(known))
    return replace(known[key], memory_bytes=_bytes(memory)) if memory else known[key]


def _bytes(text: str) -> int:
    if not (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*GB\s*", text, re.IGNORECASE)) or not float(match[1]):
        raise UsageError(f"{text!r} is no memory of a machine. Write it in GB: m4-max:36GB.")
    return round(float(match[1]) * GB)
