"""The teacher's outputs on training rows, cached in files, so that they need no memory and survive a kill.

For each token: the likeliest words with their log-probabilities, or the hidden states before the head.
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

TOP_WORDS = 64  # the teacher's likeliest words, whose probabilities are cached; all others share one bucket


def cache_teacher_outputs(
    teacher: Any, rows: TrainingRows, loss: str, watch: EventListener, prefix: Path | None = None
) -> None:
    """Set in `rows` the teacher's outputs that the loss reads; nll reads none.

    `prefix`: folder and first part of the names of the cache files, which are mapped, not loaded; complete files are
    not written again. None: the outputs are held in memory.
    """
    if loss == "nll":
        return
    kinds = {"hidden": teacher.dtype} if loss == "mse" else {"top": torch.int32, "likely": torch.float32}
    if prefix is None:
        batches = list(_teacher_outputs(teacher, rows, loss, watch))
        parts = [torch.cat(part) for part in zip(*batches, strict=True)]
    else:
        digest = rows.digest()
        files = [prefix.with_name(f"{prefix.name}-{name}-{digest}") for name in kinds]
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
    """Yield the outputs of each slice of rows, in order: hidden [rows, time, width], or top and likely."""
    for some in rows.slices():
        ids, mask = rows.ids[some], rows.counted[some].long()
        if loss == "mse":
            yield (teacher.base_model(ids, attention_mask=mask, use_cache=False)[0].to(teacher.dtype).cpu(),)
        else:
            logits = teacher(ids, attention_mask=mask, use_cache=False).logits.float()
            top = logits.topk(min(TOP_WORDS, logits.shape[-1] // 2)).indices
            buckets = topk_and_rest(logits.flatten(0, 1), top.flatten(0, 1)).log_softmax(-1)
            yield top.int().cpu(), buckets.view(*top.shape[:2], -1).cpu()
        watch(Event("recover", some.stop, len(rows.ids), {"step": "teacher_outputs"}))


def _write(files: list[Path], batches: Iterator[tuple[torch.Tensor, ...]]) -> None:
    """Write each part to its file, aside first."""
    asides = [file.with_name(f"{file.name}.partial") for file in files]
    with ExitStack() as stack:
        outs = [stack.enter_context(aside.open("wb")) for aside in asides]
        for parts in batches:
            for out, part in zip(outs, parts, strict=True):
                out.write(part.contiguous().view(torch.uint8).numpy().tobytes())
    for aside, file in zip(asides, files, strict=True):
        aside.rename(file)


def _mapped(file: Path, dtype: torch.dtype) -> torch.Tensor:
    """Map a file as a flat tensor; its pages are read on use."""
    return torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
