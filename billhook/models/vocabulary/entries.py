"""The entries of a tokenizer: which can be removed, what a text has in their place then, and what stays for others."""

from __future__ import annotations

import json
from dataclasses import dataclass

from billhook.core.errors import ModelError
from billhook.core.results.json_form import JsonObject
from billhook.models.load import Teacher
from billhook.models.vocabulary import bpe, unigram
from billhook.models.vocabulary.places import in_config, in_processor

_KINDS = "BPE, or Unigram, of the tokenizers library"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What of a vocabulary can be removed. Tokens are ids: rows of the embedding, counted from 0.

    Fields:
        rows: of the embedding; not all of them need be tokens.
        tokens: the text of every id that the tokenizer has.
        parts: of every id that can be removed, the tokens that a text has in its place by then; none for a row that is
            no token.
        needs: the tokens that a token is merged from, which stay as long as it does.
    """

    rows: int
    tokens: dict[int, str]
    parts: dict[int, tuple[int, ...]]
    needs: dict[int, tuple[int, ...]]

    @property
    def kept(self) -> frozenset[int]:
        """The ids that stay whatever is removed: special and added tokens, bytes, and characters without bytes."""
        return frozenset(range(self.rows)) - self.parts.keys()


def read_vocabulary(teacher: Teacher) -> Vocabulary:
    """Read the vocabulary of a model. Raises ModelError for a tokenizer of another kind than those that can be cut."""
    raw, tokenizer = tokenizer_json(teacher), teacher.tokenizer
    assert tokenizer is not None
    model: JsonObject = raw["model"]
    rows = int(teacher.model.get_input_embeddings().weight.shape[0])
    tokens = {index: text for text, index in tokenizer.get_vocab().items()}
    if beyond := sorted(index for index in tokens if index >= rows):
        raise ModelError(
            f"The tokenizer of {teacher.name} has {tokens[beyond[0]]!r} as token {beyond[0]:,}, and the embedding has "
            f"{rows:,} rows. Give the embedding a row for it first: model.resize_token_embeddings({beyond[-1] + 1})"
        )
    fixed = set(tokenizer.added_tokens_decoder) | special_ids(teacher, raw)
    read = bpe.parts_and_needs if model["type"] == "BPE" else unigram.parts_and_needs
    parts, needs = read(model)
    parts |= dict.fromkeys(range(rows) - tokens.keys(), ())
    return Vocabulary(rows, tokens, {index: of for index, of in parts.items() if index not in fixed}, needs)


def tokenizer_json(teacher: Teacher) -> JsonObject:
    """Return the tokenizer of a model as the tokenizers library writes it. Raises ModelError for what is no such."""
    backend = getattr(teacher.tokenizer, "backend_tokenizer", None)
    if teacher.tokenizer is None:
        raise ModelError(f"{teacher.name} has no tokenizer. Put its tokenizer files into its folder.")
    if backend is None:
        raise _foreign(teacher, type(teacher.tokenizer).__name__)
    raw: JsonObject = json.loads(backend.to_str())
    model: JsonObject = raw["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise _foreign(teacher, f"a {model['type']}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _foreign(teacher, f"a {model['type']} with {name}={model[name]!r}")
    return raw


def _foreign(teacher: Teacher, kind: str) -> ModelError:
    return ModelError(
        f"The vocabulary of {teacher.name} cannot be cut: its tokenizer is {kind}. Billhook cuts {_KINDS}, without "
        "marks inside of words."
    )


def special_ids(teacher: Teacher, raw: JsonObject) -> set[int]:
    """Return the ids that config, generation config and tokenizer name: BOS, EOS, what is put around a text …"""
    assert teacher.tokenizer is not None
    found = set(teacher.tokenizer.all_special_ids)

    def note(index: int) -> int:
        found.add(index)
        return index

    for told in (teacher.model.config.to_dict(), teacher.model.generation_config.to_dict()):
        in_config(told, note)
    in_processor([raw.get("post_processor"), raw.get("padding")], note)
    return found
