"""The types of weights that a GGUF file can have, the file itself, and llama.cpp's program for the other types."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from billhook.core.errors import BillhookError, UsageError, nearest, option
from billhook.core.events import Event, EventListener
from billhook.models.formats.gguf_rows import Key
from billhook.models.formats.gguf_tensors import EMBEDDING, HEAD, Contents

FLOATS = ("f32", "f16", "bf16")
EXACT = ("f32", "f16")  # with which llama.cpp computes as the model does; with bf16 it rounds activations to 8 bits
ROUNDED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # which the package gguf rounds to
BY_PROGRAM = (  # which llama.cpp's program rounds to, without a text to learn from
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)
PROGRAM = "llama-quantize"
FINE = "q8_0"  # of the embedding and the head, where the rest is rounded to less
IN_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")  # beside all tensors of one dimension


def check_type(dtype: str) -> None:
    """Raise UsageError for a type of weights that no file can have."""
    known = (*FLOATS, *ROUNDED, *BY_PROGRAM)
    if dtype not in known:
        near = nearest(dtype, known)
        guess = f" Did you mean {near}?" if near else ""
        raise UsageError(f"{option('dtype', dtype)} is no type of a GGUF file.{guess} Known: {', '.join(known)}.")


def write_file(
    path: Path, arch: str, keys: Mapping[str, Key], held: Contents, *, dtype: str, watch: EventListener
) -> list[str]:
    """Write a GGUF file, tensor by tensor. Returns the tensors that are finer than `dtype`: their rows do not divide.

    `keys`: whole names, or those after `ARCHITECTURE.` that begin with none of the format's families.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    writer = GGUFWriter(path, arch)
    ftype = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_file_type(LlamaFileType[ftype])
    writer.add_quantization_version(2)
    for name, value in keys.items():
        _add_key(writer, name, value)
    kinds: dict[str, Any] = {}
    for name, piece in held.pieces.items():
        kinds[name] = kind = GGMLQuantizationType[_kind_of(name, piece.shape, dtype).upper()]
        block, size = GGML_QUANT_SIZES[kind]
        shape = piece.shape
        if kind.name not in ("F32", "F16"):
            shape = (*shape[:-1], shape[-1] // block * size)
        item = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        writer.add_tensor_info(name, shape, item, int(np.prod(shape)) * item.itemsize, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, (name, piece) in enumerate(held.pieces.items(), 1):
            watch(Event("save", i, len(held.pieces), {"step": dtype}))
            with np.errstate(over="ignore"):
                data = quantize(piece.value().numpy(), kinds[name])
            writer.write_tensor_data(_in_range(data, name))
    finally:
        writer.close()
    wanted = GGMLQuantizationType[dtype.upper()]
    return [n for n, p in held.pieces.items() if len(p.shape) > 1 and kinds[n] != wanted and kinds[n].name == "F16"]


def _in_range(values: Any, name: str) -> Any:
    """Return what is to be written. Raises UsageError for numbers that float16 does not reach."""
    if values.dtype == np.float16 and not np.isfinite(values).all():
        raise UsageError(f"{name} has weights beyond the range of f16. Choose {option('dtype', 'bf16')}.")
    return values


def _kind_of(name: str, shape: Sequence[int], dtype: str) -> str:
    """Return the type of one tensor: as llama.cpp's own converter chooses, and finer where rows do not divide."""
    if len(shape) == 1 or name.endswith(("_norm.weight", *IN_FLOAT32)):
        return "f32"
    if dtype in FLOATS:
        return dtype
    if shape[-1] % 32:
        return "f16"
    return FINE if name in (EMBEDDING, HEAD) else dtype


def _add_key(writer: Any, name: str, value: Key) -> None:
    """Add a key in the type that llama.cpp expects."""
    families = ("general.", "tokenizer.", "billhook.")
    key = name if name.startswith(families) else f"{writer.arch}.{name}"
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# -- llama.cpp's program ----------------------------------------------------------------------------------------------


def find_program() -> str | None:
    """Return the program that rounds GGUF files: on the path, or in the package ik-llama-cpp-python."""
    if (found := shutil.which(PROGRAM)) is not None:
        return found
    package = importlib.util.find_spec("ik_llama_cpp")
    for place in (package.submodule_search_locations or ()) if package else ():
        if (path := Path(place) / "bin" / PROGRAM).is_file():
            return str(path)
    return None


def run_program(program: str, source: Path, target: Path, dtype: str) -> None:
    """Round a file to a type by llama.cpp's program. Raises BillhookError with its last words where it fails.

    The program of ik_llama.cpp has types of its own for rows that are no multiple of 256, which llama.cpp does not
    read: such tensors are rounded to q8_0 in a second run, as llama.cpp's own program would.
    """
    _run([program, str(source), str(target), dtype.upper()], source, target, dtype)
    if foreign := foreign_tensors(target):
        rules = ",".join(f"^{re.escape(name)}$=q8_0" for name in foreign)
        target.unlink()
        _run([program, "--custom-q", rules, str(source), str(target), dtype.upper()], source, target, dtype)


def _run(command: list[str], source: Path, target: Path, dtype: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not target.is_file():
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines()]
        said = " / ".join(line for line in lines if re.search("error|fail|assert|invalid", line, re.I))[-400:]
        raise BillhookError(
            f"{command[0]} does not round {source.name} to {dtype} (exit status {done.returncode}). {said}".rstrip()
        )


def foreign_tensors(file: Path) -> list[str]:
    """Return the tensors of a GGUF file whose type the format does not know."""
    from gguf import GGMLQuantizationType, GGUFReader

    found: dict[str, int] = {}

    class Types(GGUFReader):
        """Reads names and types; a type that it does not know would end the reading of the tensors."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:  # the name's length and bytes, dimensions, sizes, type, offset
                found[bytes(field.parts[1]).decode("utf-8")] = int(field.parts[4][0])

    Types(file)
    known = {each.value for each in GGMLQuantizationType}
    return [name for name, kind in found.items() if kind not in known]
