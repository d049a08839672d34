"""The tokenizer of a GGUF file as the files that its model had before it was made into one.

transformers builds a tokenizer from a GGUF file by the kind of vocabulary. What it leaves out is set here: how the file
says that text is split, which entries are unused, which tokens are added to the ends of a text, and scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.core.errors import ModelError
from billhook.core.results.json_form import JsonObject
from billhook.models.formats.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    sentencepiece_model,
)

_ADDED_SCORE = -1000.0  # of tokens that were added beside the vocabulary, in files that llama.cpp's converter wrote
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a byte-level vocabulary splits text. `ignore_merges`: a word that is an entry is taken whole."""

    before: JsonObject | None = None  # a step before the byte level; None: GPT-2's own pattern alone
    own_pattern: bool = True  # GPT-2's, inside the byte level
    ignore_merges: bool = False
    normalizer: JsonObject | None = None

    def pre_tokenizer(self) -> JsonObject:
        """Return it as tokenizer.json has it."""
        level: JsonObject = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        level["use_regex"] = self.own_pattern
        return level if self.before is None else {"type": "Sequence", "pretokenizers": [self.before, level]}


def _by_pattern(digits: str) -> JsonObject:
    pattern = {"Regex": _WORDS + digits + _REST}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


_GPT2 = Splitting()
_DIGITS = Splitting({"type": "Digits", "individual_digits": True})
_QWEN2 = Splitting(_by_pattern(""), own_pattern=False, normalizer={"type": "NFC"})
_LLAMA3 = Splitting(_by_pattern("{1,3}"), own_pattern=False, ignore_merges=True)
_DBRX = Splitting(_by_pattern("{1,3}"), own_pattern=False)
# By `tokenizer.ggml.pre`, where llama.cpp splits by the same pattern.
SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "a.x-4.0"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("qwen2", "megrez", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _DBRX),
}


def complete_tokenizer(path: Path, folder: Path) -> None:
    """Complete the tokenizer that transformers made of the GGUF file `path` and saved in `folder`.

    Raises ModelError where the file splits text in a way that is not known here, and that transformers overlooked.
    """
    said = _said(path)
    settings = _read(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, there in (("add_bos_token",) * 2, ("add_eos_token",) * 2, ("add_prefix_space", "add_space_prefix")):
        if there in said:
            settings[name] = bool(said[there])
    if said.get("model") == "gpt2":
        text = _read(folder / "tokenizer.json")
        _write(folder / "tokenizer.json", _byte_level(text, said, path))
    elif said.get("model") == "llama" and {"scores", "token_type"} <= said.keys():
        spelled = {each["id"]: each["content"] for each in _read(folder / "tokenizer.json").get("added_tokens", ())}
        settings["added_tokens_decoder"] = _added(said, spelled)
        space_prefix = bool(said.get("add_space_prefix", True))
        model = sentencepiece_model(_pieces(said), add_space_prefix=space_prefix)
        (folder / "tokenizer.model").write_bytes(model)
    _write(folder / "tokenizer_config.json", settings)


def _said(path: Path) -> dict[str, Any]:
    """What the header of a GGUF file says under `tokenizer.ggml.`."""
    import gguf

    start = "tokenizer.ggml."
    fields = gguf.GGUFReader(path).fields
    return {name.removeprefix(start): field.contents() for name, field in fields.items() if name.startswith(start)}


def _byte_level(text: JsonObject, said: dict[str, Any], path: Path) -> JsonObject:
    """Return a tokenizer.json that splits text as the file says, and has no entry for what the file calls unused."""
    name = said.get("pre")
    splitting = SPLITTINGS.get(name) if isinstance(name, str) else None
    if splitting is not None:
        text["pre_tokenizer"], text["normalizer"] = splitting.pre_tokenizer(), splitting.normalizer
        text["model"]["ignore_merges"] = splitting.ignore_merges
    elif name not in (None, "default") and (text.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        raise ModelError(
            f"{path} says tokenizer.ggml.pre={name}, a way of splitting text that is not known for GGUF files. Known: "
            f"{', '.join(sorted(SPLITTINGS))}. Give the model's safetensors folder instead."
        )
    unused = {
        token for token, type_ in zip(said["tokens"], said.get("token_type", ()), strict=False) if type_ == UNUSED
    }
    text["model"]["vocab"] = {token: index for token, index in text["model"]["vocab"].items() if token not in unused}
    return text


def _pieces(said: dict[str, Any]) -> list[Piece]:
    """The entries as SentencePiece has them: one is unknown, and a space is written ▁."""
    unknown = said.get("unknown_token_id", 0)
    rows = zip(said["tokens"], said["scores"], said["token_type"], strict=True)
    pieces = []
    for index, (token, score, type_) in enumerate(rows):
        kind = UNKNOWN if index == unknown else NORMAL if type_ == UNKNOWN else type_
        pieces.append(Piece(token.replace(" ", "▁"), score, kind))
    return pieces


def _added(said: dict[str, Any], there: dict[int, str]) -> JsonObject:
    """The `added_tokens_decoder` of tokenizer_config.json: control tokens that were added, and the user's own.

    `there`: how tokenizer.json spells those that it has; another spelling would be one more token.
    """
    rows = enumerate(zip(said["tokens"], said["scores"], said["token_type"], strict=True))
    return {
        str(index): {
            **{"content": there.get(index, token.replace(" ", "▁")), "special": type_ == CONTROL},
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
        }
        for index, (token, score, type_) in rows
        if type_ == USER_DEFINED or (type_ == CONTROL and score == _ADDED_SCORE)
    }


def _read(file: Path) -> JsonObject:
    read: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    return read


def _write(file: Path, text: JsonObject) -> None:
    file.write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
