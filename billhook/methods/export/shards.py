"""Weights from file to file: the shards of a student that is never in memory as a whole, and what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from billhook.core.errors import BillhookError
from billhook.core.events import Event, EventListener
from billhook.models import channel_groups, structure
from billhook.models.load import Teacher
from billhook.models.pruned_config import read_config
from billhook.models.streaming import StreamedWeights
from billhook.models.surgery import student_name

_Cut = tuple[
    channel_groups.ChannelLayout, channel_groups.ParameterSlice, list[list[int]]
]  # of which layout, which slot, and what stays of each expert


def copy_shards(
    student: Any, teacher: Teacher, weights: StreamedWeights, folder: Path, watch: EventListener, *, most: int
) -> None:
    """Copy what the student keeps from the source's shards, bit for bit, in shards of at most `most` bytes.

    What a repair changed, or put in, comes from memory, in the checkpoint's dtype.
    """
    kept = read_config(student.config).kept_blocks
    has = student.state_dict(keep_vars=True)
    own = {id(p) for p in teacher.model.parameters()} | {id(b) for b in teacher.model.buffers()}
    cuts, narrower = _cuts(student, teacher), dict[str, _Cut]()
    jobs: dict[str, tuple[str | None, torch.Tensor | None]] = {}  # by new name: its name in the source, its new value
    covered: set[str] = set()
    for name, targets in weights.targets().items():
        new = student_name(teacher, name, kept)
        there = {t: has[t] for old in targets if (t := student_name(teacher, old, kept)) in has and t is not None}
        covered |= there.keys()
        if new is not None and there:
            fresh = [tensor for tensor in there.values() if id(tensor) not in own]
            jobs[new] = (name, fresh[0] if len(fresh) == len(there) else None)
            if (cut := next((cuts[t] for t in there if t in cuts), None)) is not None:
                narrower[new] = cut
    for name, tensor in has.items():
        if isinstance(tensor, nn.Parameter) and name not in covered and id(tensor) not in own:
            jobs[name] = (None, tensor)

    def value(new: str) -> torch.Tensor:
        name, fresh = jobs[new]
        if fresh is None or name is None:
            return weights.source(name) if name else fresh.detach().to("cpu", teacher.dtype)  # type: ignore[union-attr]
        source = weights.source(name)
        if new in narrower:
            source = channel_groups.kept_tensor(source, *narrower[new])
            return source if fresh.device.type == "meta" else fresh.detach().to("cpu", source.dtype)
        if fresh.device.type == "meta":
            return torch.zeros_like(source)
        assert source.shape == fresh.shape, f"{new} is stored in another form than it is used"
        return fresh.detach().to("cpu", source.dtype)

    items = teacher.dtype.itemsize
    sizes = {
        n: weights.source_bytes(old) if old and n not in narrower else t.numel() * items  # type: ignore[union-attr]
        for n, (old, t) in jobs.items()
    }
    shards = _packed(sizes, most)
    files: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        watch(Event("save", i, len(shards) + 2, {"step": "copy_shards"}))
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {new: value(new).contiguous() for new in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        check_written(folder / file, tensors)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def check_written(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises BillhookError if any tensor of a new file is not, bit for bit, what was to be written there."""
    with safe_open(file, framework="pt") as written:
        for name in written.keys():  # noqa: SIM118 - not a dict
            there, wanted = written.get_tensor(name), tensors[name]
            if there.dtype != wanted.dtype or not torch.equal(there, wanted.cpu()):
                raise BillhookError(
                    f"{file.name} does not hold {name} as it was written, so that the checkpoint does not load back "
                    "equal; it was deleted. Check the disk, and save again."
                )


def _cuts(student: Any, teacher: Teacher) -> dict[str, _Cut]:
    """How the parameters of sites that became narrower come of the teacher's, by the student's names."""
    pruned, row, cuts = read_config(student.config), teacher.architecture, dict[str, _Cut]()
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for site, narrowed in pruned.narrowed.items():
        size, left = sizes[site], narrowed.groups
        if left == size.groups:
            continue
        of = structure.channel_layout(teacher.block(size.site.block), size.site.part, row, teacher.model.config)
        place = f"{row.blocks}.{pruned.index(site)}."
        for slot in of.slots:
            cuts[place + slot.name] = of, slot, channel_groups.kept_positions(of, size.groups, left)
    return cuts


def _packed(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, in portions of at most `most` bytes unless one alone is larger."""
    portions: list[list[str]] = []
    held = most + 1
    for name, size in sizes.items():
        if held + size > most:
            portions.append([])
            held = 0
        portions[-1].append(name)
        held += size
    return portions
