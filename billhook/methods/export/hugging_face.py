"""Checkpoints that transformers loads: as narrow as the student is, or of the stock shape with zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from billhook.methods.export import Exported, Student, export
from billhook.methods.export.checkpoint import verify_round_trip, verify_streamed_round_trip, write_checkpoint
from billhook.methods.export.targets import Form
from billhook.models.surgery import apply


@export()
def transformers(student: Student, folder: Path) -> Exported:
    """A Hugging Face checkpoint: stock where whole blocks are missing, else of its own type with its modelling code.

    Formula: the tensors that are left, bit for bit
    Cost: the size of what is left on disk; one reading.
    Source: ours.
    """
    return _proven(student, student.model, folder)


@export(Form(sites="zeros", mlp_widths="alike", attention_widths="alike", inserts=False, biases=False))
def stock(student: Student, folder: Path) -> Exported:
    """A Hugging Face checkpoint of the stock type whose removed sites hold zeros: loads everywhere, without speed-up.

    Formula: as transformers, and zeros for the weights of removed sites
    Cost: the size of the unpruned model on disk; one reading.
    Source: ours.
    """
    model = student.model
    if model.config.model_type.startswith("billhook-"):
        model = apply(student.teacher, student.plan, stock=True, repair=student.repair)
    return _proven(student, model, folder)


def _proven(student: Student, model: Any, folder: Path) -> Exported:
    """Write a model, and run what was written. Raises BillhookError on any difference."""
    teacher, watch = student.teacher, student.watch
    files = write_checkpoint(model, teacher.tokenizer, student.plan, folder, teacher=teacher, watch=watch)
    if teacher.weights is not None:
        verify_streamed_round_trip(teacher, student.plan, folder, student.tokens, repair=student.repair, watch=watch)
    else:
        verify_round_trip(model, folder, student.tokens, watch)
    return Exported(folder, tuple(files), str(model.config.model_type))
