"""A checkpoint with a part of the vocabulary: weights, config and tokenizer, proven before the folder appears."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from billhook.core.events import EventListener, ignore_events
from billhook.core.files.foreign_files import read_json_object
from billhook.core.files.target_folder import check_target, publish, staging_folder
from billhook.core.plan import Plan, format_ranges
from billhook.core.results.json_form import JsonObject
from billhook.methods.export.checkpoint import verify_round_trip, write_checkpoint
from billhook.methods.export.verification import PROBE_TEXTS
from billhook.models.load import Teacher
from billhook.models.pruned_config import MANIFEST
from billhook.models.vocabulary.entries import tokenizer_json
from billhook.models.vocabulary.files import cut_files, verify_tokenizer

T = TypeVar("T")


def save_cut(
    teacher: Teacher,
    student: Any,
    numbers: Mapping[int, int],
    folder: Path,
    *,
    prove: Callable[[Any], T],
    texts: Sequence[str] = (),
    watch: EventListener = ignore_events,
) -> T:
    """Write what `cut_model` returned to the new `folder`, with the tokenizer cut alike: it is there whole, or not.

    `numbers`: {old id: new id}. `prove`: is given the cut tokenizer before the folder appears; returns what it returns.
    `texts`: on which the tokenizer is compared with the teacher's, beside some in several scripts. The ids that were
    kept are in billhook.json. Raises UsageError or ResourceError where the folder cannot be written, BillhookError
    where model or tokenizer do not load back equal.
    """
    check_target(folder, teacher.folder, teacher.anatomy.total("bytes"))
    aside = staging_folder(folder, secrets.token_hex(3))
    try:
        write_checkpoint(student, None, Plan(), aside, teacher=teacher, watch=watch)
        cut_files(aside, tokenizer_json(teacher), numbers)
        note_cut(aside / MANIFEST, teacher, numbers)
        cut = verify_tokenizer(teacher.tokenizer, aside, numbers, [*PROBE_TEXTS, *texts])
        rows = torch.tensor([cut("\n".join(PROBE_TEXTS))["input_ids"][:16]])
        verify_round_trip(student, aside, rows, watch)
        found = prove(cut)
        publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found


def note_cut(manifest: Path, given: Teacher, numbers: Mapping[int, int]) -> None:
    """Say in billhook.json that the plan is one of the model `given`, and which of its rows are left, in new order."""
    told = {"model": given.fingerprint, "vocabulary": _told(given, numbers)}
    manifest.write_text(json.dumps(read_json_object(manifest) | told, indent=2) + "\n")


def is_cut_folder(folder: Path, given: Teacher, numbers: Mapping[int, int]) -> bool:
    """Whether a folder is what `save_cut` wrote of the model `given` and these rows."""
    manifest = folder / MANIFEST
    told = read_json_object(manifest) if manifest.is_file() else {}
    return (told.get("model"), told.get("vocabulary")) == (given.fingerprint, _told(given, numbers))


def _told(given: Teacher, numbers: Mapping[int, int]) -> JsonObject:
    rows = int(given.model.get_input_embeddings().weight.shape[0])
    return {"rows": rows, "kept": format_ranges(sorted(numbers, key=numbers.__getitem__))}
