"""What stands beside the weights of a student: its teacher's own config, tokenizer, templates and licence."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from billhook.core.errors import ModelError
from billhook.core.files.foreign_files import read_json_object
from billhook.core.results.json_form import JsonObject
from billhook.models import architectures, modeling_billhook
from billhook.models.load import Teacher
from billhook.models.sources import cache_folder
from billhook.models.transformers_internals import LAYER_PATTERNS

CONFIG = "config.json"
GENERATION = ("generation_config.json",)
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "*.bpe", "bpe.codes", "*.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
LEGAL = ("*licen[sc]e*", "*notice*", "*use_policy*", "*copying*", "*copyright*")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def write_beside_weights(student: Any, tokenizer: Any | None, teacher: Teacher, folder: Path) -> None:
    """Write all files of a student but weights and plan: its teacher's, byte for byte, and its config.

    `tokenizer`: another than the teacher's, which then is written instead of the teacher's files.
    """
    raw = json.loads((teacher.folder / CONFIG).read_text(encoding="utf-8"))
    raw = with_older_names(raw) if teacher.folder.parent == cache_folder() else raw
    text = json.dumps(student_text(raw, teacher.model, student), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    write_companions(tokenizer, teacher, folder)
    if is_pruned_type(student):
        code = Path(modeling_billhook.__file__)
        shutil.copyfile(code, folder / code.name)


def write_companions(tokenizer: Any | None, teacher: Teacher, folder: Path) -> None:
    """Write the tokenizer, the generation config and the licence: its teacher's files, or another `tokenizer`."""
    own = tokenizer is None or tokenizer is teacher.tokenizer
    generation = GENERATION if _is_json(teacher.folder / GENERATION[0]) else ()
    copy_files(teacher.folder, folder, (*generation, *LEGAL, *(TOKENIZER if own else ())))
    if own and (teacher.folder / "tokenizer_config.json").is_file():
        settings = (teacher.folder / "tokenizer_config.json").read_text(encoding="utf-8")
        copy_files(teacher.folder, folder, ("*.py",) if '"auto_map"' in settings else ())
    elif not own:
        tokenizer.save_pretrained(folder)  # type: ignore[union-attr]


def _is_json(path: Path) -> bool:
    """Whether a file is there, and holds a JSON object."""
    with suppress(ModelError):
        read_json_object(path)
        return True
    return False


def with_older_names(raw: JsonObject) -> JsonObject:
    """Return a config.json that says rope and dtype also where transformers 4 and llama.cpp look for them.

    For the copy of a GGUF file, whose config.json the installed transformers made up.
    """
    rope: JsonObject = raw.get("rope_parameters") or {}
    every: JsonObject = rope.get("full_attention", rope)
    local: JsonObject = rope.get("sliding_attention", {})
    scaling = {name: value for name, value in every.items() if name not in ("rope_theta", "partial_rotary_factor")}
    older = {
        "torch_dtype": raw.get("dtype"),
        "rope_theta": every.get("rope_theta"),
        "rope_local_base_freq": local.get("rope_theta"),
        "partial_rotary_factor": every.get("partial_rotary_factor"),
        "rope_scaling": scaling if every.get("rope_type", "default") != "default" else None,
    }
    return {**raw, **{name: value for name, value in older.items() if value is not None and name not in raw}}


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of a model's folder whose names match a pattern, whatever their case; never weights."""
    for path in (*source.iterdir(), *source.glob("additional_chat_templates/*")):
        name = path.relative_to(source).as_posix().lower()
        if path.is_file() and any(fnmatch(name, p) for p in patterns) and not any(fnmatch(name, p) for p in WEIGHTS):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def is_pruned_type(model: Any) -> bool:
    """Return whether a model is of a type `billhook-…`, which brings its own code."""
    return str(model.config.model_type).startswith("billhook-")


def student_text(raw: JsonObject, teacher: Any, student: Any) -> JsonObject:
    """Return the config.json of a student: `raw`, its teacher's, in which nothing differs but what pruning changed.

    A key keeps the name under which `raw` has it. What `raw` leaves to be derived is added only where it would be
    derived wrongly now.
    """
    config = student.config
    given, before, after = _as_json(_parsed(teacher.config, raw)), _as_json(teacher.config), _as_json(config)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    text = copy.deepcopy(raw)
    text.pop("auto_map", None)  # names code that the student does not carry

    def say(name: str, spelling: str) -> None:
        if after.get(name) is None:
            text.pop(spelling, None)
        else:
            text[spelling] = after[name]

    for name in changed:
        for spelling in {name, *(s for s, real in config.attribute_map.items() if real == name)} & text.keys():
            say(name, spelling)
    for name in ("model_type", "per_layer_config", "billhook"):
        say(name, name)
    read = _as_json(_parsed(config, text))
    missed = [n for n in after if read.get(n) != after[n] and (n in changed or read.get(n) != given.get(n))]
    for name in missed:
        say(name, name)
    if architectures.BLOCK_KINDS in missed:
        for name in LAYER_PATTERNS:
            text.pop(name, None)
    if is_pruned_type(student):
        text["auto_map"] = after["auto_map"]
    if is_pruned_type(student) or is_pruned_type(teacher):
        text["architectures"] = [type(student).__name__]
    return text


def _parsed(config: Any, text: JsonObject) -> Any:
    """A config of the class of `config` from a config.json, as transformers reads it."""
    return type(config).from_dict({name: copy.deepcopy(text[name]) for name in text if name != "auto_map"})


def _as_json(config: Any) -> JsonObject:
    told: JsonObject = json.loads(config.to_json_string(use_diff=False))
    return told
