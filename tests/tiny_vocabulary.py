"""Tiny checkpoints with real vocabularies: of bytes, of characters with byte fallback, with `ignore_merges`, Unigram.

They are trained on the documentation that every Python carries, with text in other alphabets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tiny
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OTHER = "Быстрая лиса перепрыгнула через собаку. " * 40 + "敏捷的棕色狐狸跳过了懒狗。" * 40 + "où est le café ? " * 40
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte_level", "whole_words", "byte_fallback", "unigram")
SIZE = 900
PADDING = 12  # rows that are no tokens


@cache
def english() -> tuple[str, ...]:
    return tuple(topics[name] for name in sorted(topics)[:24])


def corpus() -> Iterator[str]:
    yield from (*english(), OTHER)


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    """As GPT-2, SmolLM and Qwen; with `ignore_merges` as Llama 3, where a word that is an entry is taken whole."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    if ignore_merges:
        raw = json.loads(backend.to_str())
        raw["model"]["ignore_merges"] = True
        for word in ("Ġstatement", "Ġdefinition", "Ġобака"):  # which no merges make
            raw["model"]["vocab"].setdefault(word, len(raw["model"]["vocab"]))
        backend = Tokenizer.from_str(json.dumps(raw))
    return backend


def byte_fallback() -> Tokenizer:
    """As Gemma: every pair that makes an entry is a merge, the earlier entries first."""
    backend = Tokenizer(models.BPE())
    replaced = normalizers.Replace(" ", "▁")
    backend.normalizer = replaced
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=SIZE - 260, show_progress=False))
    trained = sorted(backend.get_vocab().items(), key=lambda entry: entry[1])
    pieces = [text for text, _ in trained if len(text) > 1]
    characters = [text for text, _ in trained if len(text) == 1]
    vocabulary = {text: i for i, text in enumerate(["<unk>", *SPECIAL, *BYTES, *pieces, *characters])}
    merges = [
        (text[:at], text[at:])
        for text in pieces
        for at in range(1, len(text))
        if text[:at] in vocabulary and text[at:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = replaced
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> Tokenizer:
    """As SentencePiece's Unigram with byte fallback."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE - 260, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    raw = json.loads(backend.to_str())
    raw["model"]["vocab"] += [[text, -50.0] for text in BYTES]
    raw["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(raw))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return backend


@cache
def _trained(kind: str) -> str:
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}
    backend = byte_level(ignore_merges=True) if kind == "whole_words" else made[kind]()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_special_tokens([AddedToken("<|tool|>", special=True)])  # beside the vocabulary
    number = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return backend.to_str()


def folder(path: Path, kind: str = "byte_level", variant: str = "llama", **overrides: Any) -> Path:
    """A checkpoint whose embedding has more rows than its tokenizer entries, with a chat template."""
    backend = Tokenizer.from_str(_trained(kind))
    ids = {
        f"{name}_token_id": backend.token_to_id(text)
        for name, text in zip(("pad", "bos", "eos"), SPECIAL[:3], strict=True)
    }
    model = tiny.build(variant, **{"vocab_size": backend.get_vocab_size() + PADDING, **ids, **overrides})
    model.generation_config.eos_token_id = [ids["eos_token_id"], backend.token_to_id("<|user|>")]
    model.generation_config.suppress_tokens = [backend.token_to_id("<|tool|>")]
    model.save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def sentences() -> list[str]:
    """The English text, a sentence each."""
    return [part for text in english() for part in re.split(r"(?<=[.:]) |\n\n", text) if part]
