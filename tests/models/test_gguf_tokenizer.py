"""What a GGUF file says of its tokenizer, in the copy that Billhook makes of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers

from billhook.core.errors import ModelError
from billhook.models.formats.gguf_tokenizer import SPLITTINGS, complete_tokenizer
from billhook.models.formats.sentencepiece_file import Piece, sentencepiece_model

gguf = pytest.importorskip("gguf")
SPM = [
    *[("<unk>", -1000.0, 3), ("<s>", -1000.0, 3), ("</s>", -1000.0, 3), ("<tool>", -1000.0, 4), ("  ", -1000.0, 4)],
    *[(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)],
    *[("▁a", -0.0, 1), ("ab", -1.0, 1), ("▁", -2.0, 1), ("a", -3.0, 1), ("b", -4.0, 1), ("[PAD266]", -10000.0, 5)],
]


def write_gguf(path: Path, model: str, tokens: list[tuple[str, float, int]], pre: str, merges: list[str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_types([type_ for _, _, type_ in tokens])
    if model == "llama":
        writer.add_token_scores([score for _, score, _ in tokens])
    else:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copied(path: Path, folder: Path) -> Path:
    """The tokenizer of the copy of a GGUF file, without the weights."""
    tiny.saved(folder, "llama", vocab_size=512)
    transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    complete_tokenizer(path, folder)
    return folder


def byte_level(path: Path, pre: str) -> Path:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĠĠ", "Ġ1", "12", "123", "1234", "ĊĠ", "ab"]
    merges = ["Ġ Ġ", "1 2", "12 3", "123 4", "Ġ 1", "Ċ Ġ", "a b"]
    specials = [("<unk>", 0.0, 3), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<tool>", 0.0, 4)]
    entries = [*specials, *[(token, 0.0, 1) for token in (*alphabet, *words)], ("[PAD267]", 0.0, 5)]
    return write_gguf(path, "gpt2", entries, pre, merges)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ", "Ġ", "1234"]),
        ("smollm", ["ĠĠ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, pieces: list[str], tmp_path: Path) -> None:
    folder = copied(byte_level(tmp_path / "small.gguf", pre), tmp_path / "copy")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("  1234") == pieces
    assert tokenizer("<tool><s>").input_ids == [3, 1]
    assert "[PAD267]" not in tokenizer.get_vocab()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"


def test_a_way_of_splitting_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "small.gguf", "falcon")
    with pytest.raises(ModelError, match=r"pre=falcon.*Known: .*qwen2.*safetensors folder"):
        copied(path, tmp_path / "copy")
    assert "falcon" not in SPLITTINGS


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer, read by its own rules."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 5:
            yield key >> 3, struct.unpack_from("<f", message, at)[0]
            at += 4
        else:
            size = varint()
            yield key >> 3, message[at : at + size]
            at += size


def test_scores_and_kinds_of_entries_stand_in_tokenizer_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", "llama", SPM, "default", [])
    folder = copied(path, tmp_path / "copy")
    parts = list(fields((folder / "tokenizer.model").read_bytes()))
    pieces = [dict(fields(value)) for field, value in parts if field == 1]
    assert [(p[1].decode(), p[2]) for p in pieces] == [(text.replace(" ", "▁"), score) for text, score, _ in SPM]
    assert [p[3] for p in pieces] == [2, *[type_ for _, _, type_ in SPM[1:]]]
    trainer, normalizer = (dict(fields(value)) for field, value in parts if field in (2, 3))
    assert trainer == {3: 2, 4: len(SPM), 35: 1, 40: 0}
    assert normalizer == {1: b"identity", 3: 0, 4: 0, 5: 1}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    assert {index: (entry["content"], entry["special"]) for index, entry in added.items()} == {
        **{"0": ("<unk>", True), "1": ("<s>", True), "2": ("</s>", True), "3": ("<tool>", False), "4": ("  ", False)}
    }
    assert (settings["add_bos_token"], settings["add_prefix_space"]) == (False, False)


def test_sentencepiece_reads_what_is_written() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = [Piece("<unk>", 0.0, 2), *[Piece(text.replace(" ", "▁"), score, type_) for text, score, type_ in SPM[1:]]]
    read = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(pieces, add_space_prefix=True))
    assert [read.IdToPiece(index) for index in range(len(pieces))] == [piece.text for piece in pieces]
    assert [read.GetScore(index) for index in range(len(pieces))] == [piece.score for piece in pieces]
    assert read.Encode("ab a", out_type=str) == ["▁a", "b", "▁a"]
