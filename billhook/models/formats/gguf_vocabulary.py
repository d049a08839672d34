"""A tokenizer as llama.cpp reads it from a GGUF file. How it splits text is recognised by structure, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.core.errors import ModelError
from billhook.core.files.foreign_files import shown
from billhook.core.results.json_form import JsonObject
from billhook.models.formats.gguf_tokenizer import SPLITTINGS
from billhook.models.load import Teacher

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
KEYS = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # how the format spells them
TokenizerKeys = dict[str, bool | int | str | list[str] | list[int] | list[float]]
NO_MERGE = -1e6  # the score of a token that no merge makes: it is never compared with another

BYTE_LEVEL = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx")  # one name of llama.cpp's for every way to split
_REPLACE: JsonObject = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND: JsonObject = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}
_MERGED: JsonObject = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
_META: JsonObject = {"type": "Metaspace", "replacement": "▁", "split": False}

# What a tokenizer with byte fallback does with spaces: normalizer, pre-tokenizer, whether one is put before a text.
SENTENCE_PIECE: tuple[tuple[JsonObject | None, JsonObject | None, bool], ...] = (
    (_PREPEND, None, True),
    (None, {**_META, "prepend_scheme": "first"}, True),
    (None, {**_META, "prepend_scheme": "always"}, True),
    (None, {**_META, "prepend_scheme": "never"}, False),
    (_REPLACE, None, False),
    (_REPLACE, _MERGED, False),
)


def tokenizer_keys(teacher: Teacher, rows: int) -> TokenizerKeys:
    """Return the keys of a tokenizer with `rows` entries, as many as the embedding has. Without one, `no_vocab`.

    Raises ModelError for a tokenizer that splits text in another way than llama.cpp is known to.
    """
    tokenizer = teacher.tokenizer
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    raw: JsonObject = json.loads(backend.to_str()) if backend is not None else {}
    keys = _splitting(raw, teacher)
    texts, types = _tokens(raw, tokenizer, rows, pieces=keys["tokenizer.ggml.model"] == "llama")
    keys |= {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in raw["model"]["merges"]]
    if keys["tokenizer.ggml.model"] == "llama":
        keys["tokenizer.ggml.scores"] = _scores(texts, pairs)
    else:  # in which a space stands for a space between the two
        keys["tokenizer.ggml.merges"] = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    return keys | _special(teacher) | _templates(tokenizer)


def _splitting(raw: JsonObject, teacher: Teacher) -> TokenizerKeys:
    """Return the keys that say how text is split, of the tokenizers library's JSON of a tokenizer."""
    model: JsonObject = raw.get("model") or {}
    normalizer, before = raw.get("normalizer"), _plain(raw.get("pre_tokenizer"))
    whole = bool(model.get("ignore_merges"))
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        for normal, split, space in SENTENCE_PIECE:
            if (normalizer, before) == (normal, split):
                return {
                    "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                    "tokenizer.ggml.add_space_prefix": space,
                }  # fmt: skip
    elif model.get("type") == "BPE" and (normalizer is None or normalizer.get("type") == "NFC"):
        for name in BYTE_LEVEL:
            known = SPLITTINGS[name]
            if (before, whole) == (_plain(known.pre_tokenizer()), known.ignore_merges):
                return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    found = {"model": model.get("type"), "normalizer": normalizer, "pre_tokenizer": before, "ignore_merges": whole}
    raise ModelError(
        f"Billhook does not know llama.cpp's name for how the tokenizer of {teacher.name} splits text: {shown(found)}. "
        "Convert the checkpoint that the export transformers writes with llama.cpp's own script: "
        "python convert_hf_to_gguf.py FOLDER"
    )


def _plain(before: JsonObject | None) -> JsonObject | None:
    """Return a pre-tokenizer without what changes no token: whether offsets are trimmed, a sequence of one."""
    if before is None:
        return None
    if before.get("type") == "Sequence":
        steps = [_plain(step) for step in before["pretokenizers"]]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return {name: value for name, value in before.items() if name != "trim_offsets"}


def _tokens(raw: JsonObject, tokenizer: Any, rows: int, *, pieces: bool) -> tuple[list[str], list[int]]:
    """Return the text and the type of every token; rows of the embedding that have none are padding, never used."""
    texts, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for text, index in raw["model"]["vocab"].items():
        if index < rows:
            texts[index] = text
            types[index] = BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL
    for token in raw["added_tokens"]:
        index, text = token["id"], token["content"]
        if index < rows:
            types[index] = CONTROL if token["special"] else USER_DEFINED
            texts[index] = text if token["special"] else text.replace("▁", " ")
    if pieces and (unknown := tokenizer.unk_token_id) is not None and unknown < rows:
        types[unknown] = UNKNOWN
    return texts, types


def _scores(texts: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return a score for every token, by which llama.cpp merges: the earlier a merge makes it, the higher."""
    made: dict[str, int] = {}
    for pair in merges:
        made.setdefault("".join(pair), len(made))
    return [-float(made[text]) if text in made else NO_MERGE for text in texts]


def _special(teacher: Teacher) -> TokenizerKeys:
    """Return the numbers of special tokens, and which of them stand around every text."""
    tokenizer, config = teacher.tokenizer, teacher.model.config
    ids: dict[str, int] = {}
    for name in SPECIAL:
        index = getattr(tokenizer, f"{name}_token_id", None)
        index = index if index is not None or name not in ("bos", "eos") else getattr(config, f"{name}_token_id", None)
        if isinstance(index, int):
            ids[name] = index
    if "eos" in ids:
        ids.setdefault("bos", ids["eos"])  # llama.cpp would take token 11
    keys: TokenizerKeys = {f"tokenizer.ggml.{KEYS.get(name, name)}_token_id": index for name, index in ids.items()}
    assert tokenizer is not None
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    keys["tokenizer.ggml.add_bos_token"] = len(around) > len(bare) and around[0] == ids.get("bos")
    keys["tokenizer.ggml.add_eos_token"] = len(around) > len(bare) and around[-1] == ids.get("eos")
    return keys


def _templates(tokenizer: Any) -> TokenizerKeys:
    """Return the chat templates: one, or several by name of which `default` is the one that programs take."""
    found: str | Mapping[str, str] | None = getattr(tokenizer, "chat_template", None)
    if not found:
        return {}
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    keys: TokenizerKeys = {f"tokenizer.chat_template.{name}": text for name, text in found.items() if name != "default"}
    if keys:
        keys["tokenizer.chat_templates"] = [name for name in found if name != "default"]
    return keys | ({"tokenizer.chat_template": found["default"]} if "default" in found else {})
