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
from billhook.models.accelerator.share import ALONE, Share

TOP_WORDS = 64  # the teacher's likeliest words, whose probabilities are cached; all others share one bucket


def cache_teacher_outputs(
    teacher: Any, rows: TrainingRows, loss: str, watch: EventListener, prefix: Path | None = None, *,
    share: Share = ALONE,
) -> None:  # fmt: skip
    """Set in `rows` the teacher's outputs that the loss reads; nll reads none.

    `prefix`: folder and first part of the names of the cache files, which are mapped, not loaded; complete files are
    not written again. None: the outputs are held in memory. `share`: each process computes its rows and writes them
    into the same files, which need a `prefix`.
    """
    if loss == "nll":
        return
    kinds = {"hidden": teacher.dtype} if loss == "mse" else {"top": torch.int32, "likely": torch.float32}
    if prefix is None:
        assert share.processes == 1
        batches = [parts for _, parts in _teacher_outputs(teacher, rows, loss, watch, share)]
        parts = [torch.cat(part) for part in zip(*batches, strict=True)]
    else:
        digest = rows.digest()
        files = [prefix.with_name(f"{prefix.name}-{name}-{digest}") for name in kinds]
        if not all(file.is_file() for file in files):
            _write(files, _teacher_outputs(teacher, rows, loss, watch, share), share, len(rows.ids))
        mapped = (_mapped(file, dtype) for file, dtype in zip(files, kinds.values(), strict=True))
        parts = [part.view(*rows.ids.shape, -1) for part in mapped]
    for name, part in zip(kinds, parts, strict=True):
        setattr(rows, name, part)


@torch.no_grad()
def _teacher_outputs(
    teacher: Any, rows: TrainingRows, loss: str, watch: EventListener, share: Share
) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Yield each slice of a share's rows, in order, with its outputs: hidden [rows, time, width], or top and likely."""
    own = share.part(len(rows.ids))
    for some in rows.slices(share):
        ids, mask = rows.ids[some], rows.counted[some].long()
        if loss == "mse":
            hidden = teacher.base_model(ids, attention_mask=mask, use_cache=False)[0]
            yield some, (hidden.to(teacher.dtype).cpu(),)
        else:
            logits = teacher(ids, attention_mask=mask, use_cache=False).logits.float()
            top = logits.topk(min(TOP_WORDS, logits.shape[-1] // 2)).indices
            buckets = topk_and_rest(logits.flatten(0, 1), top.flatten(0, 1)).log_softmax(-1)
            yield some, (top.int().cpu(), buckets.view(*top.shape[:2], -1).cpu())
        watch(Event("recover", some.stop - own.start, own.stop - own.start, {"step": "teacher_outputs"}))


def _write(
    files: list[Path], outputs: Iterator[tuple[slice, tuple[torch.Tensor, ...]]], share: Share, count: int
) -> None:
    """Write each part to its file, aside first: every process its rows, and the first one gives the files their names.

    `count`: rows of all processes.
    """
    asides = [file.with_name(f"{file.name}.partial") for file in files]
    with ExitStack() as stack:
        for aside in asides:
            aside.touch()  # another process may have written into it already
        outs = [stack.enter_context(aside.open("r+b")) for aside in asides]
        for some, parts in outputs:
            for out, part in zip(outs, parts, strict=True):
                row_bytes = part[0].nbytes
                out.seek(some.start * row_bytes)
                out.write(part.contiguous().view(torch.uint8).numpy().tobytes())
                if share.rank == 0:
                    out.truncate(count * row_bytes)  # longer where an earlier attempt left more
    share.wait()
    if share.rank == 0:
        for aside, file in zip(asides, files, strict=True):
            aside.rename(file)
    share.wait()


def _mapped(file: Path, dtype: torch.dtype) -> torch.Tensor:
    """Map a file as a flat tensor; its pages are read on use."""
    return torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
