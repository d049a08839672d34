"""Names of models in the runtime that serves them, `ENGINE:FILE`, and what their files say. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import MissingExtra, ModelError, UnknownName, UsageError, option
from billhook.core.plan_files import find_path
from billhook.models import demo_file
from billhook.runtimes import RUNTIMES

WEIGHTS = (".gguf", ".safetensors", ".onnx", ".bin", ".xml", ".npz")


@dataclass(frozen=True, slots=True)
class Artefact:
    """Files of an exported model, and the runtime that serves them. `path`: a file, or a folder."""

    engine: str
    path: Path

    @property
    def identity(self) -> str:
        """16 hex digits of the runtime's release and of every byte of the files."""
        digest = hashlib.sha256(f"{self.engine} {RUNTIMES[self.engine].version}".encode())
        for path in self.files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def files(self) -> list[Path]:
        """List the files, in order."""
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in self.files() if path.suffix in WEIGHTS)


def is_served(name: str) -> bool:
    """Return whether a name is `ENGINE:FILE`, and not that of a file or folder itself."""
    return bool(re.match(r"[A-Za-z][\w.+-]+:[^:/\\]|[A-Za-z][\w.+-]+:/[^/]", name)) and find_path(name) is None


def find_artefact(name: str) -> Artefact:
    """Return what `ENGINE:FILE` names; of a folder that holds one GGUF file and no config.json, that file.

    Raises UnknownName for an engine that there is not, MissingExtra for one that is not installed, ModelError for a
    missing file.
    """
    engine, _, place = name.partition(":")
    if engine not in RUNTIMES:
        raise UnknownName("engine", engine, RUNTIMES, " Write ENGINE:FILE, such as llama.cpp:student.gguf.")
    if not RUNTIMES[engine].installed:
        raise MissingExtra(f"Running a model in {engine}", RUNTIMES[engine].extra)
    path = demo_file() if place == "demo" else find_path(place)
    if path is None:
        raise ModelError(f"There is no file or folder {place}. Give what `billhook export` wrote for {engine}.")
    inside = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    return Artefact(engine, inside[0] if len(inside) == 1 else path)


def require_checkpoint(name: str) -> None:
    """Raise UsageError for `ENGINE:FILE`, where a model is changed, looked into, or run by transformers."""
    if is_served(name):
        raise UsageError(
            f"{name} runs in a runtime, where eval, compare, gate and baseline measure it, and speed with "
            f"{option('engine', name.partition(':')[0])}. Name the checkpoint that was exported."
        )


def run_folder(path: Path) -> Path:
    """Return the folder that says what a search has seen: the run's, of an export inside it."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    return folder.parent.parent if folder.parent.name == "exports" else folder


def read_positions(path: Path) -> dict[str, int]:
    """Return how many positions the files say that a model has, as a config names them; nothing where they do not."""
    if path.suffix == ".gguf":
        fields = _gguf(path).fields
        found = [field.contents() for name, field in fields.items() if name.endswith(".context_length")]
    else:
        config = path / "config.json"
        raw = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        found = [part.get("max_position_embeddings") for part in (raw, raw.get("text_config") or {})]
    most = next((value for value in found if isinstance(value, int)), None)
    return {} if most is None else {"max_position_embeddings": most}


def count_parameters(path: Path) -> int:
    """Return the number of parameters of a GGUF file; 0 of other files, which may pack several into one number."""
    return sum(int(tensor.n_elements) for tensor in _gguf(path).tensors) if path.suffix == ".gguf" else 0


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Weights that every token is multiplied by: all of a file but an embedding that is only looked up."""

    bytes: int
    elements: int


def read_weights(artefact: Artefact) -> ReadWeights | None:
    """Return what the files say of the weights that every token meets; None of a form whose tensors are not listed."""
    found: dict[str, tuple[int, int]] = {}
    if artefact.path.suffix == ".gguf":
        found = {t.name: (int(t.n_bytes), int(t.n_elements)) for t in _gguf(artefact.path).tensors}
    for file in artefact.files():
        if file.suffix == ".safetensors":
            found |= _safetensors(file)
    heads = [name for name in found if name.startswith(("output.", "lm_head."))]
    embedding = next((name for name in found if name.endswith(("token_embd.weight", "embed_tokens.weight"))), None)
    if heads and embedding:
        del found[embedding]
    sizes = tuple(map(sum, zip(*found.values(), strict=True)))
    return ReadWeights(*sizes) if sizes else None


def _safetensors(file: Path) -> dict[str, tuple[int, int]]:
    """Return the bytes and the elements of every tensor, by the header of a file."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    ends = {name: told["data_offsets"] for name, told in header.items()}
    return {name: (ends[name][1] - ends[name][0], math.prod(told["shape"])) for name, told in header.items()}


def _gguf(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("Reading a GGUF file", "llama") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path} is no GGUF file that can be read ({error}). Export it again.") from error
