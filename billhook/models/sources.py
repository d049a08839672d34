"""Where models come from: a folder, a GGUF file, the Hugging Face Hub or the demo package."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from billhook.core.errors import ModelError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.files.foreign_files import read_json, reading, shown
from billhook.core.files.target_folder import give_usual_modes
from billhook.models import find_source
from billhook.models.checks import inspect_checkpoint
from billhook.models.formats.gguf_config import read_gguf_config
from billhook.models.formats.gguf_tokenizer import complete_tokenizer
from billhook.models.streaming import check_fit
from billhook.models.transformers_internals import forget_quantisation

_COPY = "v4"  # part of the name of a converted copy: another one where conversion has changed
_MOST_BLOCKS = 1000  # of which a header tells numbers one by one


def locate(name: str, watch: EventListener = ignore_events) -> Path:
    """The folder of a model: itself, the converted copy of a GGUF file, or the Hub's snapshot."""
    source = find_source(name)
    return source if source.is_dir() else convert_gguf(source, watch)


def cache_folder() -> Path:
    """$BILLHOOK_CACHE, or `billhook` in the user's cache folder."""
    given = os.environ.get("BILLHOOK_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "billhook"


def convert_gguf(path: Path, watch: EventListener = ignore_events) -> Path:
    """A safetensors copy of a GGUF file in the cache folder, made once; its name holds the file's hash.

    The copy is float32, so that dequantised weights keep every bit. Written aside and renamed; one that is damaged is
    made anew.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_folder() / f"{path.stem}-{digest}-{_COPY}"
    if target.is_dir() and _is_whole(target):
        return target
    watch(Event("load", values={"converting": path.name}))
    _sweep(target.parent)
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        _write_safetensors(path, aside)
        give_usual_modes(aside)
        if target.is_dir() and not _is_whole(target):
            target.rename(target.with_name(f"{target.name}.half.{os.getpid()}.partial"))
        aside.rename(target)
    except OSError:  # another process finished the same copy first
        if not (target.is_dir() and _is_whole(target)):
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sweep(target.parent)
    return target


def _is_whole(folder: Path) -> bool:
    """Whether a converted copy has a tokenizer, and weights and JSON files that can be read."""
    try:
        inspect_checkpoint(folder)
        for path in folder.glob("*.json"):
            read_json(path)
    except ModelError:
        return False
    return (folder / "tokenizer_config.json").is_file() and (folder / "tokenizer.json").is_file()


def _sweep(cache: Path) -> None:
    """Delete what conversions left that were killed, or replaced."""
    for folder in cache.glob("*.partial"):
        process = folder.suffixes[-2:-1] or [""]
        running = process[0][1:].isdecimal() and psutil.pid_exists(int(process[0][1:]))
        if not running or ".half." in folder.name:
            shutil.rmtree(folder, ignore_errors=True)


def _write_safetensors(path: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file into a folder. Raises ModelError unless every tensor is there."""
    advice = "Download it again, or give a safetensors folder instead."
    auto: Any = transformers.AutoModelForCausalLM
    with reading(f"transformers cannot read {path}", advice=advice):
        _check_header(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        config = read_gguf_config(path)
        model, told = auto.from_pretrained(
            str(path.parent), gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    check_fit(missing_keys=told["missing_keys"], mismatched_keys=[str(key) for key in told["mismatched_keys"]])
    forget_quantisation(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    complete_tokenizer(path, folder)


def _check_header(path: Path) -> None:
    """Raises ModelError where the header of a GGUF file counts more than its tensors hold: nothing is built for it."""
    import gguf

    reader = gguf.GGUFReader(path)
    largest = max((int(size) for tensor in reader.tensors for size in tensor.shape), default=0)
    for name, field in reader.fields.items():
        if not name.endswith(("_count", "_length", "_size")) or name.startswith("GGUF.") or "context" in name:
            continue
        most = len(reader.tensors) if name.endswith("block_count") else largest
        for value in (field.parts[index].tolist()[0] for index in field.data[:_MOST_BLOCKS]):
            if not isinstance(value, int) or not 0 <= value <= most:
                raise ModelError(
                    f"{path} says {name}={shown(value)}, which its {len(reader.tensors)} tensors do not bear out. "
                    "Download it again."
                )
