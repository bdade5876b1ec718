"""A SentencePiece model's file, read without the package and without trust in its numbers."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from htfa_jax.data.tokenizer_file import MAX_CHARACTERS, MAX_SCORE
from htfa_jax.errors import CheckpointError

# sentencepiece_model.proto: ModelProto.SentencePiece.Type and TrainerSpec.ModelType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One token of a SentencePiece model: its text, its score and its type's number."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
      pieces: by id.
      model_type: a value of MODEL_TYPES.
      byte_fallback: characters without a piece become UTF-8 bytes, not the unknown token.
      bos_id, eos_id: out of range where there is no such token.
      charsmap: SentencePiece's compiled character normalisation, empty for none.
      add_dummy_prefix: a space goes before the text.
      trim: outer spaces are removed and inner runs become one.
    """

    pieces: list[Piece]
    model_type: str
    byte_fallback: bool
    bos_id: int
    eos_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    trim: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a tokenizer.model.

    The numbers of the fields are those of google/sentencepiece, sentencepiece_model.proto.

    Raises:
      CheckpointError: the file is damaged, cut short or something else.
    """
    pieces, specs = [], {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append(Piece(str(piece.get(1, b""), "utf-8"), score, piece.get(3, NORMAL)))
            elif number in (2, 3):
                specs[number] = dict(_fields(value))
    except (ValueError, TypeError, struct.error, OSError) as error:
        raise CheckpointError(f"{path} is not a whole SentencePiece model: {error}") from error
    # They stand behind the pieces, so that a file cut between two pieces lacks them.
    if specs.keys() != {2, 3} or [p.kind for p in pieces].count(UNKNOWN) != 1:
        raise CheckpointError(
            f"{path} is not a whole SentencePiece model: it lacks its settings or unknown token"
        )
    trainer, normalizer = specs[2], specs[3]
    for piece in pieces:
        if not 0 < len(piece.text) <= MAX_CHARACTERS or not abs(piece.score) <= MAX_SCORE:
            raise CheckpointError(
                f"{path} has the piece {piece.text[:40]!r}: pieces have 1 to {MAX_CHARACTERS} "
                f"characters and scores up to {MAX_SCORE:.0f}"
            )
    for spec, fields in ((trainer, (3, 24, 35, 41, 42)), (normalizer, (3, 4))):
        if not all(isinstance(spec.get(field, 0), int) for field in fields):
            raise CheckpointError(f"{path} has settings of another type than a number")
    if not isinstance(normalizer.get(2, b""), bytes):
        raise CheckpointError(f"{path} has a normalization that is no bytes")
    if trainer.get(24, False):
        raise CheckpointError(f"{path} has treat_whitespace_as_suffix, which is not supported")
    return SentencePieceModel(
        pieces=pieces,
        model_type=MODEL_TYPES.get(trainer.get(3, 1), str(trainer.get(3))),
        byte_fallback=bool(trainer.get(35, False)),
        bos_id=trainer.get(41, 1),
        eos_id=trainer.get(42, 2),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        trim=bool(normalizer.get(4, True)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message's fields; ValueError where it is damaged.

    Values are integers, or bytes where the message does not say what they mean
    (protobuf.dev/programming-guides/encoding).
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise ValueError(f"no number at byte {at}")
            byte = message[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown field type {kind} at byte {at}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise ValueError(f"{size} bytes are expected at byte {at} of {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size
