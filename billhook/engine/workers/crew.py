"""Which workers share a search, as a recipe's `workers` says. Pure: text and numbers, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, TypeGuard

from billhook.core.devices.names import format_devices
from billhook.core.errors import MissingExtra, RecipeError, UsageError, nearest, option

Place = Literal["processes", "ray", "slurm"]
MOST = 999  # workers
NUMBERS = {"n": (1, MOST), "gpus": (0, 64), "cpus": (1, 4096), "port": (1024, 65535)}  # least and most
SBATCH = ("partition", "account", "qos", "time", "mem", "constraint", "gres", "nodelist", "exclude", "reservation")
KEYS: dict[str, tuple[str, ...]] = {
    "ray": ("n", "gpus", "cpus"),
    "slurm": ("n", "gpus", "cpus", "host", "port", *SBATCH),
}
NEEDS = {"ray": "ray", "slurm": "submitit"}  # module, and the extra of the place's name
EXAMPLES = f"{option('workers', 4)}, {option('workers', 'ray:n=4')} or {option('workers', 'slurm:n=16,partition=gpu')}"


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers that share a search with the process that searches, which is a worker too.

    - `place`: processes of this machine, actors of a Ray cluster, or Slurm jobs.
    - `others`: how many, without the searching process; None: as many as the cluster has room for.
    - `gpus`, `cpus`: of each; None: a GPU where the searching process computes on one, and what the place gives.
    - `settings`: further ones of the place, by name.
    """

    place: Place = "processes"
    others: int | None = 0
    gpus: int | None = None
    cpus: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether nobody shares the search."""
        return self.others == 0

    def spelled(self) -> int | str:
        """Return what `parse_workers` reads as this crew: a number of processes, or a place with its settings."""
        if self.place == "processes":
            return (self.others or 0) + 1
        counts = {"n": self.others, "gpus": self.gpus, "cpus": self.cpus}
        given = {key: str(count) for key, count in counts.items() if count is not None} | dict(self.settings)
        return ":".join(filter(None, [self.place, ",".join(f"{key}={value}" for key, value in given.items())]))


def parse_workers(value: object) -> Crew:
    """Read a number of processes, `ray`, `ray:n=4,gpus=1` or `slurm:n=16,partition=gpu`.

    Raises RecipeError that names what is wrong, what is allowed, and the nearest right word.
    """
    text = str(value).strip()
    if not isinstance(value, bool) and isinstance(value, int | str) and re.fullmatch("[0-9]{1,4}", text):
        if 1 <= int(text) <= MOST:
            return Crew(others=int(text) - 1)
        raise _wrong(value, f"is not between 1 and {MOST}")
    place, colon, rest = text.partition(":")
    if not isinstance(value, str) or not _is_place(place):
        near = nearest(place, NEEDS)
        raise _wrong(value, "is neither a number, ray nor slurm", f" Did you mean {near}?" if near else "")
    settings = _settings(value, place, rest if colon else None)
    counts = {name: int(settings.pop(name)) for name in ("n", "gpus", "cpus") if name in settings}
    if place == "slurm" and "n" not in counts:
        raise _wrong(value, "does not say how many jobs to start, such as n=16")
    return Crew(place, counts.get("n"), counts.get("gpus"), counts.get("cpus"), settings)


def _is_place(name: str) -> TypeGuard[Place]:
    return name in KEYS


def _settings(value: str, place: Place, text: str | None) -> dict[str, str]:
    """Return what stands behind the colon, by name; numbers are checked."""
    found: dict[str, str] = {}
    allowed = f"{place} takes {', '.join(KEYS[place])}"
    for piece in () if text is None else text.split(","):
        name, equals, setting = (part.strip() for part in piece.partition("="))
        if name not in KEYS[place]:
            near = nearest(name, KEYS[place])
            guess = f" Did you mean {near}?" if near else ""
            raise _wrong(value, f"has {name!r}: {allowed}, each as NAME=VALUE", guess)
        if not equals or not setting:
            raise _wrong(value, f"has no value for {name}")
        if not re.fullmatch(r"[\w.:/+&|@\[\]*()-]+", setting):
            raise _wrong(value, f"has {name}={setting!r}, with a character that no such value has")
        if name in found:
            raise _wrong(value, f"gives {name} twice")
        least, most = NUMBERS.get(name, (0, 0))
        if name in NUMBERS and not (re.fullmatch("[0-9]{1,5}", setting) and least <= int(setting) <= most):
            raise _wrong(value, f"has {name}={setting}, which is not between {least} and {most}")
        found[name] = setting
    return found


def _wrong(value: object, why: str, guess: str = "") -> RecipeError:
    typed = option("workers", value if isinstance(value, int | float) else str(value)[:200])
    return RecipeError(f"{typed} {why}.{guess} Write {EXAMPLES}.")


def require_installed(crew: Crew) -> None:
    """Raise MissingExtra where the package is missing that starts these workers."""
    if crew.place in NEEDS and find_spec(NEEDS[crew.place]) is None:
        raise MissingExtra(f"Running workers as {crew.spelled()}", crew.place)


def require_one_device(crew: Crew, devices: Sequence[str]) -> None:
    """Raise UsageError where workers of a cluster, each of which has one device, would share a model on several.

    Processes of this machine have as many GPUs each as hold the model here.
    """
    gpus = all(device.startswith("cuda") for device in devices)
    if crew.alone or len(devices) == 1 or (crew.place == "processes" and gpus):
        return
    raise UsageError(
        f"{option('workers', crew.spelled())} gives each worker a device of its own, and the model lies on "
        f"{format_devices(devices)}. Type {option('workers', 1)}, or one device: {option('device', devices[0])}."
    )
