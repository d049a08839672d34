"""A Hugging Face checkpoint: written aside, compared file by file, run from the files, then renamed."""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open

from billhook.core.errors import BillhookError, ModelError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.files.target_folder import check_target, publish, staging_folder
from billhook.core.plan import Plan
from billhook.engine.probe import logits
from billhook.methods.export.beside_weights import write_beside_weights
from billhook.methods.export.shards import check_written, copy_shards
from billhook.models import architectures, checks
from billhook.models.device import dtype_name
from billhook.models.load import Teacher, load
from billhook.models.pruned_config import read_config, write_manifest
from billhook.models.repair import Repair
from billhook.models.transformers_internals import names_on_disk, tied_names

SHARD_BYTES = 4 * 10**9
COPY_BYTES = 3 * 10**8  # of a shard of a model that is never in memory as a whole


def save(
    student: Any,
    tokenizer: Any | None,
    plan: Plan,
    folder: str | Path,
    *,
    teacher: Teacher,
    watch: EventListener = ignore_events,
    shard_bytes: int | None = None,
) -> list[Path]:
    """`write_checkpoint` to a folder that appears whole or not at all: built aside, loaded back, compared, renamed.

    `shard_bytes`: of one file at most (None: 4 GB, and 300 MB of a model that is streamed). Raises UsageError or
    ResourceError if `folder` cannot be written, BillhookError if it does not load back equal.
    """
    target = Path(folder)
    check_target(target, teacher.folder, teacher.anatomy.total("bytes"))
    aside = staging_folder(target, secrets.token_hex(3))
    try:
        write_checkpoint(student, tokenizer, plan, aside, teacher=teacher, watch=watch, shard_bytes=shard_bytes)
        rows = torch.arange(16)[None] % student.config.vocab_size
        if teacher.weights is not None:
            verify_streamed_round_trip(teacher, plan, aside, rows, watch=watch)
        else:
            verify_round_trip(student, aside, rows, watch)
        publish(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sorted(target.iterdir())


def write_checkpoint(
    student: Any,
    tokenizer: Any | None,
    plan: Plan,
    folder: Path,
    *,
    teacher: Teacher,
    watch: EventListener = ignore_events,
    shard_bytes: int | None = None,
) -> list[Path]:
    """Write the student to the new `folder`: weights, config, tokenizer, generation config, and the plan.

    `plan` is what went from `teacher` (a `teacher` that was pruned before adds its own removals). Weights that equal
    the teacher's are copied from its files bit for bit, others are cast to the checkpoint's dtype. Returns the files.
    """
    folder.mkdir(parents=True)
    if teacher.weights is not None:
        copy_shards(student, teacher, teacher.weights, folder, watch, most=shard_bytes or COPY_BYTES)
    else:
        state = stored_tensors(student, teacher)
        watch(Event("save", 1, 3, {"tensors": len(state)}))
        tied = tied_names(student)
        save_torch_state_dict(
            state, folder, max_shard_size=shard_bytes or SHARD_BYTES, metadata={"format": "pt"},
            shared_tensors_to_discard=tied,
        )  # fmt: skip
        for shard in checks.shards(folder):
            check_written(shard, state)
    write_beside_weights(student, tokenizer, teacher, folder)
    write_manifest(folder, teacher.fingerprint, teacher.anatomy.blocks, plan, teacher.removed_earlier)
    return sorted(folder.iterdir())


def stored_tensors(student: Any, teacher: Teacher) -> dict[str, torch.Tensor]:
    """Return the student's tensors under the Hub's names, in the checkpoint's dtype.

    A tensor that says the same as the source's in the compute dtype is the source's, bit for bit.
    """
    state = names_on_disk(student, student.state_dict())
    tail = re.escape(teacher.architecture.blocks.rsplit(".", 1)[-1])
    kept = read_config(student.config).kept_blocks
    back = {new: teacher.positions.index(old) for new, old in enumerate(kept)}

    def source_name(name: str) -> str:
        return re.sub(rf"(^|\.){tail}\.(\d+)\.", lambda m: f"{m[1]}{tail}.{back[int(m[2])]}.", name, count=1)

    source = _Source(teacher)
    done: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied tensors once, under whichever name the source has
    for name, tensor in state.items():
        there = source.get(source_name(name))
        if there is not None:
            same = there.shape == tensor.shape and torch.equal(there.to(tensor), tensor)
            done[_place(tensor)] = there if same else tensor.to("cpu", there.dtype, copy=True)
    for name, tensor in state.items():
        if _place(tensor) not in done:
            if tensor.dtype.itemsize < teacher.dtype.itemsize:
                raise ModelError(
                    f"{name} is not among the source's tensors by any known name, and the copy in memory is rounded to "
                    f"{dtype_name(tensor.dtype)}. Use {option('dtype', 'float32')}."
                )
            done[_place(tensor)] = tensor.to("cpu", teacher.dtype, copy=True)
    return {name: done[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    """Equal for tied tensors."""
    return tensor.data_ptr(), tensor.shape


class _Source:
    """The tensors of the teacher's shards by name, read when asked for."""

    def __init__(self, teacher: Teacher) -> None:
        self._files = {}
        for shard in checks.shards(teacher.folder):
            file = safe_open(shard, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))
        self._prefix = f"{teacher.model.base_model_prefix}."  # which old checkpoints leave out

    def get(self, name: str) -> torch.Tensor | None:
        for spelling in (name, name.removeprefix(self._prefix), self._prefix + name):
            if spelling in self._files:
                tensor: torch.Tensor = self._files[spelling].get_tensor(spelling)
                return tensor
        return None


def verify_streamed_round_trip(
    teacher: Teacher,
    plan: Plan,
    folder: Path,
    rows: torch.Tensor,
    *,
    repair: Repair | None = None,
    watch: EventListener = ignore_events,
) -> None:
    """Compare what the plan leaves of a streamed teacher with `folder`, streamed as well.

    Where sites are narrower, zeros stand in the teacher for what the folder lacks, and sums are rounded in another
    order: then they are equal within the root of the dtype's epsilon, of the largest logit.
    """
    watch(Event("save", 2, 3, {"step": "load_back"}))
    again = load(folder, device=str(teacher.device), dtype=dtype_name(teacher.model.dtype), memory=0)
    mine, other = logits(teacher, plan, rows, repair), logits(again, Plan(), rows)
    room = float(mine.abs().max()) * torch.finfo(teacher.model.dtype).eps ** 0.5 if plan.narrowed else 0.0
    _require_equal(mine, other, room)
    watch(Event("save", 3, 3, {"step": "equal"}))


def _require_equal(student: torch.Tensor, reloaded: torch.Tensor, room: float = 0.0) -> None:
    """Raises BillhookError if any two differ by more than `room`."""
    student = student.to(reloaded.device)
    gap = (student - reloaded).abs().max().item()
    if not (torch.equal(student, reloaded) or gap <= room):
        raise BillhookError(
            f"The saved checkpoint does not load back equal (logits differ by {gap:g}); it was deleted."
        )


def verify_round_trip(
    student: Any, folder: Path, rows: torch.Tensor, watch: EventListener = ignore_events, *, memory: int = 0
) -> None:
    """Compare the logits on `rows` [rows, time] of a student with those of `folder`, read block by block.

    No second model is in memory, unless `memory`, as for `load`, has room for one. Both run in the measuring engine.
    Where the device rounds sums in another order, they are equal within the root of the dtype's epsilon, of the
    largest. Raises BillhookError if they are not.
    """
    watch(Event("save", 2, 3, {"step": "load_back"}))
    again = load(folder, device=str(student.device), dtype=dtype_name(student.dtype), memory=memory)
    mine, other = (logits(teacher, Plan(), rows) for teacher in (replace(again, model=student, weights=None), again))
    _require_equal(mine, other, float(mine.abs().max()) * torch.finfo(student.dtype).eps ** 0.5)
    watch(Event("save", 3, 3, {"step": "equal"}))
    assert architectures.base_type(again.model.config.model_type) == architectures.base_type(student.config.model_type)
