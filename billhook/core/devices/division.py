"""Which device holds which blocks of a model that is larger than one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from billhook.core.devices.names import format_devices
from billhook.core.errors import ResourceError, UsageError, option


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes of a model's weights.

    - `blocks`: of each block, in order.
    - `first`: of what stands before them, the embedding; of a tied head too.
    - `last`: of what stands after them, the head.
    """

    blocks: tuple[int, ...]
    first: int
    last: int


def divide_blocks(sizes: ModelBytes, room: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """Return for each block the number of the device that holds it, in ascending order.

    The first device also holds the embedding, the last one the head. Among all divisions it is one whose fullest
    device, as a share of its room, is least full: exact, by the shares of shorter beginnings.

    - `room`: bytes that weights may take on each device; `names`: what the devices are called.

    Raises ResourceError with all figures where the model does not fit, and UsageError for a device that would hold
    nothing.
    """
    ends = list(accumulate(sizes.blocks, initial=0))
    last = len(room) - 1

    def share(device: int, start: int, end: int) -> float:
        held = ends[end] - ends[start] + sizes.first * (device == 0) + sizes.last * (device == last)
        return held / max(1, room[device])

    best = [[share(0, 0, end) for end in range(len(ends))]]  # by device and blocks so far: the fullest device's share
    starts: list[list[int]] = [[0] * len(ends)]
    for device in range(1, len(room)):
        pairs = [
            min((max(best[-1][start], share(device, start, end)), start) for start in range(end + 1))
            for end in range(len(ends))
        ]
        best.append([value for value, _ in pairs])
        starts.append([start for _, start in pairs])
    if best[-1][-1] > 1:
        raise _too_large(sizes, room, names)
    of_block: list[int] = []
    end = len(sizes.blocks)
    for device in range(last, -1, -1):
        start = starts[device][end]
        if start == end and not (sizes.first * (device == 0) + sizes.last * (device == last)):
            rest = format_devices([name for name in names if name != names[device]])
            raise UsageError(f"{names[device]} would hold no part of the model. Type {option('device', rest)}.")
        of_block = [device] * (end - start) + of_block
        end = start
    return tuple(of_block)


def _too_large(sizes: ModelBytes, room: Sequence[int], names: Sequence[str]) -> ResourceError:
    """Return the error for a model that several devices cannot hold."""
    whole = sum(sizes.blocks) + sizes.first + sizes.last
    have = ", ".join(f"{name} {each / 1e9:,.1f} GB" for name, each in zip(names, room, strict=True))
    return ResourceError(
        f"The model's weights take {whole / 1e9:,.1f} GB: {len(sizes.blocks)} blocks of up to "
        f"{max(sizes.blocks) / 1e9:,.2f} GB, {sizes.first / 1e9:,.2f} GB before them and {sizes.last / 1e9:,.2f} GB "
        f"after them. They do not fit into the room for weights, most of what is free: {have}. Name more devices, take "
        f"{option('dtype', 'bfloat16')}, or name one device: {option('device', names[0])} reads the blocks from disk, "
        "one by one."
    )
