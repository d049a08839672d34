"""Names of devices: `cpu`, `cuda:1`, and several GPUs that hold one model, as `cuda:0-1,3`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from billhook.core.errors import UsageError, nearest, option
from billhook.core.plan import format_ranges, shorten

KINDS = ("auto", "cpu", "cuda", "mps")
OTHER_NAMES = {"gpu": "cuda or mps", "nvidia": "cuda", "rocm": "cuda", "apple": "mps", "metal": "mps"}
ALLOWED = "Write auto, cpu, mps, cuda, cuda:1, or several GPUs for one model: cuda:0-7, cuda:0,2 or cuda:0-1,3."


def parse_devices(text: str) -> tuple[str, ...]:
    """Return the devices that a text names, in its order: `cuda:0-1,3` is cuda:0, cuda:1 and cuda:3.

    Raises UsageError for another kind, for numbers where a kind has none, and for a device that is named twice.
    """
    kind, colon, numbers = text.partition(":")
    if kind not in KINDS:
        near = OTHER_NAMES.get(kind.lower()) or nearest(kind, KINDS)
        guess = f" Did you mean {near}?" if near else ""
        raise UsageError(f"There is no kind of device {shorten(kind)!r}.{guess} {ALLOWED}")
    if not colon:
        return (kind,)
    if kind != "cuda":
        raise UsageError(
            f"{option('device', shorten(text))} numbers devices, and only those of cuda have numbers: Billhook takes "
            f"one {kind}. Type {option('device', kind)}."
        )
    if not re.fullmatch(r"[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?)*", numbers):
        typed = option("device", shorten(text))
        raise UsageError(f"{shorten(numbers)!r} are no numbers of devices in {typed}. {ALLOWED}")
    found: list[int] = []
    for piece in numbers.split(","):
        first, _, last = piece.partition("-")
        if last and int(last) < int(first):
            raise UsageError(f"{piece} in {option('device', shorten(text))} goes down. Write {last}-{first}.")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) < len(found):
        twice = next(number for number in found if found.count(number) > 1)
        once = format_devices([f"cuda:{number}" for number in dict.fromkeys(found)])
        raise UsageError(f"{option('device', shorten(text))} names cuda:{twice} twice. Type {option('device', once)}.")
    return tuple(f"cuda:{number}" for number in found)


def format_devices(names: Sequence[str]) -> str:
    """Return the text that names devices: `cuda:0-1,3`. Those of another kind follow after a plus sign."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        kind, _, number = name.partition(":")
        numbers.setdefault(kind, []).extend([int(number)] if number else [])
    texts = {kind: format_ranges(own).replace(" ", ",") for kind, own in numbers.items()}
    return "+".join(f"{kind}:{text}" if text else kind for kind, text in texts.items())
