"""GGUF files, which llama.cpp and what is built on it read: Ollama, LM Studio and others."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from billhook.core.errors import BillhookError, MissingExtra, ModelError, option
from billhook.core.results.exports import Verification
from billhook.methods.export import Exported, Student, export
from billhook.methods.export.targets import Form, first_form, student_shape
from billhook.methods.export.verification import PROBE_TEXTS, verify
from billhook.models.architectures import base_type
from billhook.models.device import dtype_name
from billhook.models.formats.gguf_metadata import context_length, model_keys
from billhook.models.formats.gguf_rows import DECI_ROWS, ROWS, GgufRow
from billhook.models.formats.gguf_tensors import EMBEDDING, MLP_STEP, Contents, contents
from billhook.models.formats.gguf_vocabulary import tokenizer_keys
from billhook.models.formats.gguf_writer import (
    BY_PROGRAM,
    EXACT,
    FLOATS,
    PROGRAM,
    check_type,
    find_program,
    run_program,
    write_file,
)

RUNTIME = "llama.cpp"
MOST_ROUNDED_KL = 1.0  # nats per token: a rounded file that is further away is no model any more


def _refuse(rows: dict[str, GgufRow]) -> Callable[[Any], str | None]:
    return lambda config: rows[base_type(config.model_type)].fault(config)


def _native(*, alike: bool) -> Form:
    """Return the form of the types of which heads may be removed, all alike, or of those of which they may not."""
    types = tuple(name for name, row in ROWS.items() if row.heads_fill_width != alike)
    widths = "alike" if alike else "none"
    return Form(
        "native", "none", "alike", widths, inserts=False, biases=False, architectures=types,  # type: ignore[arg-type]
        refuse=_refuse(ROWS), runtimes=(RUNTIME,), mlp_step=MLP_STEP,
    )  # fmt: skip


FORMS = (
    _native(alike=True),
    _native(alike=False),
    Form(
        "deci", inserts=False, constants=True, architectures=tuple(DECI_ROWS), refuse=_refuse(DECI_ROWS),
        runtimes=(RUNTIME,), mlp_step=MLP_STEP,
    ),
)  # fmt: skip


@export(*FORMS)
def gguf(student: Student, folder: Path, *, dtype: str = "f16") -> Exported:
    """A GGUF file for llama.cpp, Ollama and LM Studio: of the model's own type, or of type deci for single sites.

    Formula: the weights in the type `dtype`; missing sites have stand-ins that compute nothing
    Cost: the size of the file, twice for rounded types; one reading in llama.cpp.
    Source: the GGUF specification; llama.cpp's models (MIT).
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("A GGUF file", "llama")
    check_type(dtype)
    teacher, model = student.teacher, student.model
    if teacher.weights is not None:
        raise ModelError(f"{teacher.name} is larger than the memory that is free, so no GGUF file can be made of it.")
    if model.dtype.itemsize < teacher.dtype.itemsize:
        raise ModelError(
            f"{teacher.name} is loaded in {dtype_name(model.dtype)}, which is coarser than its file. Load it with "
            f"{option('dtype', 'float32')}."
        )
    form = first_form("gguf", FORMS, student_shape(teacher, student.plan, student.repair), ())
    row = (DECI_ROWS if form.name == "deci" else ROWS)[teacher.anatomy.model_type]
    held = contents(model, row)
    keys = {
        "general.name": Path(teacher.name).name.removesuffix(".gguf"),
        **model_keys(model.config, row, held),
        **tokenizer_keys(teacher, held.pieces[EMBEDDING].shape[0]),
    }
    folder.mkdir(parents=True)
    file, verified, notes = _written(student, folder, dtype, row, (held, keys))
    (folder / "Modelfile").write_text(_modelfile(student, file), encoding="utf-8")
    return Exported(
        folder, tuple(sorted(folder.iterdir())), f"GGUF {row.name}, {file.stem.removeprefix('model-')}",
        verified=verified, notes=(*notes, *_notes(model.config, row, verified)),
    )  # fmt: skip


def _written(
    student: Student, folder: Path, dtype: str, row: GgufRow, inside: tuple[Contents, dict[str, Any]]
) -> tuple[Path, Verification | None, list[str]]:
    """Write the file, verified. What is rounded is verified unrounded first, so that no mistake passes as rounding."""
    held, keys = inside
    exact = dtype if dtype in EXACT else "f32" if dtype in FLOATS else "f16"
    file, target = (folder / f"model-{name.upper()}.gguf" for name in (exact, dtype))
    write_file(file, row.name, keys, held, dtype=exact, watch=student.watch)
    verified = verify(RUNTIME, file, student)
    if exact == dtype:
        return file, verified, []
    notes: list[str] = []
    if dtype in BY_PROGRAM:
        program = find_program()
        if program is None:
            command = shlex.join([PROGRAM, file.name, target.name, dtype.upper()])
            return file, verified, [f"{PROGRAM} was not found, so the weights are f16. To round them, type: {command}"]
        run_program(program, file, target, dtype)
        notes.append(f"Rounded by {program}.")
    else:
        finer = write_file(target, row.name, keys, held, dtype=dtype, watch=student.watch)
        if finer:
            more = f" and {len(finer) - 1} more" if finer[1:] else ""
            notes.append(f"In f16, since rows of other types are a multiple of 32: {finer[0]}{more}.")
    if verified is not None:
        notes.append(f"Before rounding: KL {verified.kl:.2g} nats on average and {verified.worst:.2g} at most.")
    file.unlink()
    verified = verify(RUNTIME, target, student, most_kl=None)
    if verified is not None and not verified.kl <= MOST_ROUNDED_KL:
        raise BillhookError(
            f"Rounded to {dtype} this model is no model any more: its next tokens diverge by {verified.kl:.2g} nats on "
            f"average. Nothing was kept. Choose a finer {option('dtype')}, such as q8_0."
        )
    return target, verified, notes


def _modelfile(student: Student, file: Path) -> str:
    """Return a Modelfile for Ollama, which takes the chat template from the GGUF file."""
    lines = [f"FROM ./{file.name}"]
    end = getattr(student.teacher.tokenizer, "eos_token", None)
    if end:
        quoted = str(end).replace('"', '\\"')
        lines.append(f'PARAMETER stop "{quoted}"')
    return "\n".join(lines) + "\n"


def _notes(config: Any, row: GgufRow, verified: Verification | None) -> list[str]:
    notes = ["Ollama and LM Studio read GGUF files by llama.cpp's code; Billhook did not run them."]
    if verified is not None and verified.texts is not None and verified.texts < len(PROBE_TEXTS):
        notes.append(
            "Before a text that begins with a space llama.cpp puts another one, as SentencePiece does; "
            "transformers does not."
        )
    most = context_length(config, row)
    if most < config.max_position_embeddings:
        notes.append(
            f"Its context is {most} tokens, the sliding window of the model: llama.cpp has no windows for this type."
        )
    return notes


__all__ = ["FORMS", "gguf"]
