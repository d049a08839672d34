"""What a training has to know of the teacher about its rows, kept in files, so that neither memory nor a kill loses it.

Of every token the likeliest words with their log-probabilities, or what the head reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from billhook.core.events import Event, EventListener
from billhook.engine.losses import topk_and_rest
from billhook.methods.recover.training import TrainingRows

TOP_WORDS = 64  # of the teacher's words whose probabilities are kept; the others are one bucket


def cache_teacher_outputs(
    teacher: Any, rows: TrainingRows, loss: str, watch: EventListener, kept: Path | None = None
) -> None:
    """Note in `rows` what the loss has to know of the teacher. Nothing for nll.

    `kept`: a folder, and how the names of files in it begin that hold what this teacher says; they are mapped, not
    loaded, and are not written again where a call before has written them whole. None: all of it is in memory.
    """
    if loss == "nll":
        return
    kinds = {"hidden": teacher.dtype} if loss == "mse" else {"top": torch.int32, "likely": torch.float32}
    if kept is None:
        found = list(_teacher_outputs(teacher, rows, loss, watch))
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
    else:
        of = rows.digest()
        files = [kept.with_name(f"{kept.name}-{name}-{of}") for name in kinds]
        if not all(file.is_file() for file in files):
            _write(files, _teacher_outputs(teacher, rows, loss, watch))
        mapped = (_mapped(file, dtype) for file, dtype in zip(files, kinds.values(), strict=True))
        parts = [part.view(*rows.ids.shape, -1) for part in mapped]
    for name, part in zip(kinds, parts, strict=True):
        setattr(rows, name, part)


@torch.no_grad()
def _teacher_outputs(
    teacher: Any, rows: TrainingRows, loss: str, watch: EventListener
) -> Iterator[tuple[torch.Tensor, ...]]:
    """What is noted of some rows at a time, in order: hidden [rows, time, width], or top and likely."""
    for some in rows.slices():
        ids, mask = rows.ids[some], rows.counted[some].long()
        if loss == "mse":
            yield (teacher.base_model(ids, attention_mask=mask, use_cache=False)[0].cpu(),)
        else:
            logits = teacher(ids, attention_mask=mask, use_cache=False).logits.float()
            top = logits.topk(min(TOP_WORDS, logits.shape[-1] // 2)).indices
            buckets = topk_and_rest(logits.flatten(0, 1), top.flatten(0, 1)).log_softmax(-1)
            yield top.int().cpu(), buckets.view(*top.shape[:2], -1).cpu()
        watch(Event("recover", some.stop, len(rows.ids), {"step": "teacher_outputs"}))


def _write(files: list[Path], batches: Iterator[tuple[torch.Tensor, ...]]) -> None:
    """The parts, each into its file, aside and then under its name."""
    asides = [file.with_name(f"{file.name}.partial") for file in files]
    with ExitStack() as stack:
        outs = [stack.enter_context(aside.open("wb")) for aside in asides]
        for parts in batches:
            for out, part in zip(outs, parts, strict=True):
                out.write(part.contiguous().view(torch.uint8).numpy().tobytes())
    for aside, file in zip(asides, files, strict=True):
        aside.rename(file)


def _mapped(file: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file as a flat tensor. Its pages are read when they are asked for."""
    return torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
