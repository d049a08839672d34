"""A SentencePiece `tokenizer.model`: pieces with their scores, for programs that read scores there alone.

The messages are those of sentencepiece_model.proto: ModelProto (pieces 1, trainer_spec 2, normalizer_spec 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of a piece; a GGUF file has the same numbers
_BPE = 2  # TrainerSpec.model_type


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of a vocabulary. `type`: one of the six constants above."""

    text: str
    score: float
    type: int


def sentencepiece_model(pieces: Iterable[Piece], *, add_space_prefix: bool) -> bytes:
    """Return a `tokenizer.model` of a byte-fallback BPE vocabulary, whose ids are the order of `pieces`.

    One piece is UNKNOWN: the format asks for it.
    """
    listed = list(pieces)
    body = b"".join(_bytes(1, _piece(piece)) for piece in listed)
    fallback = any(piece.type == BYTE for piece in listed)
    unknown = next(index for index, piece in enumerate(listed) if piece.type == UNKNOWN)
    trainer = _number(3, _BPE) + _number(4, len(listed)) + _number(35, fallback) + _number(40, unknown)
    normalizer = _bytes(1, b"identity") + _number(3, add_space_prefix) + _number(4, False) + _number(5, True)
    return body + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece(piece: Piece) -> bytes:
    score = _varint(2 << 3 | 5) + struct.pack("<f", piece.score)
    return _bytes(1, piece.text.encode()) + score + _number(3, piece.type)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
