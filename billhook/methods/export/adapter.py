"""A LoRA adapter beside the checkpoint that it was trained on, and on no other."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from billhook.core.errors import BillhookError, DataError, FingerprintError, UsageError, option
from billhook.core.files.foreign_files import read_json_object, reading
from billhook.methods.export import EXPORTS, Exported, Student, export
from billhook.models import checks
from billhook.models.load import load
from billhook.models.surgery import apply

ADAPTER_FOLDER = "adapter"  # inside the checkpoint's own
ADAPTER_MANIFEST = "billhook.json"  # inside the adapter's: what it belongs to


@export()
def adapter(student: Student, folder: Path) -> Exported:
    """A Hugging Face checkpoint without the last training, and a LoRA adapter beside it that adds that.

    Formula: as transformers; W + α/r · B A with the adapter
    Cost: as transformers, and one more pass.
    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), in peft's format.
    """
    if student.adapter is None or student.base is None:
        raise UsageError(
            "This student has no adapter beside it. Train one: "
            f"{option('recover', 'lora')} {option('recover_set', {'merge': 'no'})}"
        )
    model = apply(student.teacher, student.plan, repair=student.base)
    written = EXPORTS["transformers"](replace(student, model=model, repair=student.base), folder)
    gap = save_adapter(student.adapter, folder, model, student)
    return replace(written, files=tuple(sorted(folder.rglob("*"))), difference=gap)


def load_with_adapter(folder: str | Path, adapter: str | Path | None = None) -> Any:
    """The checkpoint in `folder` with its adapter, as peft's model: the one in `folder`/adapter, or another.

    Raises FingerprintError unless it was trained on this very checkpoint: the blocks of a pruned model are renumbered,
    so that an adapter of another one would go to the wrong places, and fit. DataError where there is none.
    """
    folder = Path(folder).expanduser()
    chosen = Path(adapter).expanduser() if adapter is not None else folder / ADAPTER_FOLDER
    if not (chosen / ADAPTER_MANIFEST).is_file():
        raise DataError(
            f"{chosen} is no adapter of Billhook's. One comes with {option('recover', 'lora')} "
            f"{option('recover_set', {'merge': 'no'})}, in the "
            f"folder {ADAPTER_FOLDER} of the pruned model."
        )
    wanted = read_json_object(chosen / ADAPTER_MANIFEST, DataError).get("base")
    found = checks.fingerprint(folder)
    if wanted != found:
        raise FingerprintError(
            f"The adapter {chosen} was trained on a checkpoint with the fingerprint {wanted}, and that of {folder} is "
            f"{found}: other weights, or other blocks under the same numbers. Give the folder that it came with."
        )
    return _adapted(load(folder).model, chosen)


def _adapted(model: Any, adapter: Path) -> Any:
    """A model with an adapter, as peft's."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        with reading(f"peft cannot read the adapter {adapter}", DataError):
            return peft.PeftModel.from_pretrained(model, adapter)


@torch.inference_mode()
def save_adapter(trained: Path, folder: Path, base: Any, student: Student) -> float:
    """Copy a trained adapter into the checkpoint in `folder`, tied to it, and prove that it makes the student of it.

    `base`: the model of that checkpoint in memory; the adapter is put into it. Their logits must agree up to the
    rounding of a sum in another order. Returns by how much they differ. Raises BillhookError if it is more.
    """
    shutil.copytree(trained, folder / ADAPTER_FOLDER, ignore=shutil.ignore_patterns("README.md"))  # it names our paths
    tie = {"base": checks.fingerprint(folder)}
    (folder / ADAPTER_FOLDER / ADAPTER_MANIFEST).write_text(json.dumps(tie) + "\n", encoding="utf-8")
    rows = student.tokens.to(student.model.device)
    mine = student.model(rows, use_cache=False).logits.float()
    other = _adapted(base, folder / ADAPTER_FOLDER)(input_ids=rows, use_cache=False).logits.float()
    gap, scale = float((mine - other).abs().max()), float(mine.abs().max())
    if gap > 0.02 * scale:
        raise BillhookError(f"The adapter does not load back equal (logits differ by {gap:g}); it was deleted.")
    return gap
