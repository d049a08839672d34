"""What narrowed sites need besides weights, computed once for each and copied to the device once for many."""

from __future__ import annotations

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from billhook.core.plan import KeptGroups, Site
from billhook.models import channel_groups, structure
from billhook.models.load import Teacher

LIMIT = 2**26  # bytes of entries on the devices: 560 widths of an MLP of 14,336 neurons


@dataclass(frozen=True, slots=True)
class NarrowedPart:
    """What is kept of a narrowed site, as `channel_groups` reads it.

    - `cut`: whether the part is cut, instead of zeroed where groups are removed.
    - `entries`: those that are kept of a part that is cut, else those that are removed; on the device of the block.
    """

    layout: channel_groups.ChannelLayout
    kept: Sequence[Sequence[int]]
    cut: bool
    entries: dict[str, list[torch.Tensor]]

    def tensors(self) -> dict[int, torch.Tensor]:
        """Return its tensors, each once."""
        return {id(each): each for several in self.entries.values() for each in several}

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors().values())


class NarrowedParts:
    """Narrowed parts of one teacher, by what is kept; the least recently used are dropped beyond `limit` bytes.

    The CPU waits for a GPU at each copy from ordinary memory. So all that a walk narrows is brought in one copy.
    """

    def __init__(self, teacher: Teacher, limit: int = LIMIT) -> None:
        self._teacher, self._limit = teacher, limit
        self.nbytes = 0  # of all entries
        self._alive = {size.site: size.groups for size in teacher.anatomy.sites}
        self._layouts: dict[Site, channel_groups.ChannelLayout] = {}
        self._parts: OrderedDict[KeptGroups, NarrowedPart] = OrderedDict()

    def bring(self, narrowed: Iterable[KeptGroups]) -> None:
        """Bring the parts that are not there, as many as the limit allows, in one copy to each device."""
        wanted = dict.fromkeys(narrowed)
        for each in wanted.keys() & self._parts.keys():
            self._parts.move_to_end(each)
        room = self._limit - sum(self._parts[each].nbytes for each in wanted if each in self._parts)
        new: dict[KeptGroups, NarrowedPart] = {}
        for each in wanted:
            if each not in self._parts and room > 0:
                new[each] = self._built(each)
                room -= new[each].nbytes
        by_device: dict[torch.device, dict[KeptGroups, NarrowedPart]] = defaultdict(dict)
        for each, part in new.items():
            by_device[self._device(each)][each] = part
        for device, parts in by_device.items():
            new |= _moved(parts, device)
        self._parts |= new
        self.nbytes += sum(part.nbytes for part in new.values())
        while self.nbytes > self._limit and len(self._parts) > 1:
            self.nbytes -= self._parts.popitem(last=False)[1].nbytes

    def __getitem__(self, narrow: KeptGroups) -> NarrowedPart:
        """Return a part, which is brought alone where it is not there."""
        if narrow not in self._parts:
            self.bring((narrow,))
        return self._parts[narrow]

    def _device(self, narrow: KeptGroups) -> torch.device:
        return self._teacher.block_device(self._teacher.positions.index(narrow.site.block))

    def _built(self, narrow: KeptGroups) -> NarrowedPart:
        """Return a part whose entries are on the CPU."""
        teacher, site = self._teacher, narrow.site
        block: nn.Module = teacher.block(site.block)
        if site not in self._layouts:
            config = teacher.model.config
            self._layouts[site] = structure.channel_layout(block, site.part, teacher.architecture, config)
        layout = self._layouts[site]
        kept = [
            array("i", places) for places in channel_groups.kept_positions(layout, self._alive[site], narrow.groups)
        ]
        cut = site.part == "mlp" and layout.experts == 1
        return NarrowedPart(layout, kept, cut, channel_groups.entries_of(block, layout, kept, removed=not cut))


def _moved(parts: dict[KeptGroups, NarrowedPart], device: torch.device) -> dict[KeptGroups, NarrowedPart]:
    """Return parts whose entries are on a device, where one copy has brought them."""
    if device.type == "cpu":
        return parts
    tensors = {key: each for part in parts.values() for key, each in part.tensors().items()}
    there = torch.cat([*tensors.values()]).to(device).split([len(each) for each in tensors.values()])
    own = {key: each.clone() for key, each in zip(tensors, there, strict=True)}  # a piece would keep all in memory
    return {
        narrow: replace(part, entries={name: [own[id(each)] for each in all_] for name, all_ in part.entries.items()})
        for narrow, part in parts.items()
    }
