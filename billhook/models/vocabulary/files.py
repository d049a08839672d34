"""The tokenizer files of a checkpoint without the entries that were removed, and with the new ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from billhook.core.errors import BillhookError
from billhook.core.files.foreign_files import read_json_object, reading
from billhook.core.results.json_form import JsonObject
from billhook.models.vocabulary.bpe import pairs
from billhook.models.vocabulary.places import in_config, in_processor

TOKENIZER = "tokenizer.json"
# The same vocabulary in older forms, which tokenizer.json replaces.
OLDER = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.bpe", "bpe.codes")


def cut_files(folder: Path, tokenizer: JsonObject, numbers: Mapping[int, int]) -> None:
    """Cut the tokenizer files and the generation config that were copied into `folder`.

    `tokenizer`: the tokenizer.json, for a folder that has none. `numbers`: the new id of every token that is kept.
    Older forms of the vocabulary are deleted.
    """
    path = folder / TOKENIZER
    raw = read_json_object(path) if path.is_file() else tokenizer
    _write(path, cut_tokenizer(raw, numbers))
    _change(folder / "tokenizer_config.json", lambda told: _settings(told, numbers))
    _change(folder / "added_tokens.json", lambda told: {text: numbers[index] for text, index in told.items()})
    _change(folder / "generation_config.json", lambda told: told | in_config(told, lambda i: numbers.get(i, i)))
    for pattern in OLDER:
        for older in folder.glob(pattern):
            older.unlink()


def cut_tokenizer(raw: JsonObject, numbers: Mapping[int, int]) -> JsonObject:
    """Return a tokenizer.json with the entries of `numbers` alone, under their new ids."""
    model: JsonObject = raw["model"]
    if model["type"] == "BPE":
        kept = {text: numbers[index] for text, index in model["vocab"].items() if index in numbers}
        merges = [pair for pair in pairs(model) if {*pair, "".join(pair)} <= kept.keys()]
        spelled = [list(pair) for pair in merges] if _lists(model) else [" ".join(pair) for pair in merges]
        model = {**model, "vocab": dict(sorted(kept.items(), key=lambda entry: entry[1])), "merges": spelled}
    else:
        rows = [row for index, row in enumerate(model["vocab"]) if index in numbers]
        unknown = model.get("unk_id")
        model = {**model, "vocab": rows, "unk_id": None if unknown is None else numbers[unknown]}
    added = [{**each, "id": numbers[each["id"]]} for each in raw.get("added_tokens") or ()]
    around = {name: in_processor(raw.get(name), numbers.__getitem__) for name in ("post_processor", "padding")}
    return {**raw, "added_tokens": added, **around, "model": model}


def _lists(model: JsonObject) -> bool:
    return bool(model["merges"]) and isinstance(model["merges"][0], list)


def _settings(told: JsonObject, numbers: Mapping[int, int]) -> JsonObject:
    added = told.get("added_tokens_decoder")
    if added is None:
        return told
    return {**told, "added_tokens_decoder": {str(numbers[int(index)]): each for index, each in added.items()}}


def _change(path: Path, change: Callable[[JsonObject], JsonObject]) -> None:
    if path.is_file():
        _write(path, change(read_json_object(path)))


def _write(path: Path, told: JsonObject) -> None:
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_tokenizer(whole: Any, folder: Path, numbers: Mapping[int, int], texts: Sequence[str]) -> Any:
    """Return the tokenizer of a cut folder, as transformers loads it.

    Raises BillhookError unless its entries are those of `numbers`, it has the same tokens of every text that needs no
    others, and gives back every text that the `whole` one gives back.
    """
    with reading(f"transformers cannot read the tokenizer in {folder}"):
        cut = transformers.AutoTokenizer.from_pretrained(str(folder))
    expected = {text: numbers[index] for text, index in whole.get_vocab().items() if index in numbers}
    if (found := cut.get_vocab()) != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[:3]
        raise BillhookError(f"The tokenizer does not load back with the entries that it should have: {wrong}")
    for text in texts:
        old, new = whole(text)["input_ids"], cut(text)["input_ids"]
        same = [numbers.get(index) for index in old] == new or not all(index in numbers for index in old)
        if not same or whole.decode(old) != cut.decode(new):
            raise BillhookError(f"The cut tokenizer does not read {text[:80]!r} as the whole one does.")
    return cut
