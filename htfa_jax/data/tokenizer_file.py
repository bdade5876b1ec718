"""tokenizer.json of others: only components that are known here, with bounded fields.

The library that runs them knows regular expressions that never end, texts that grow, and ways to
stop its own thread. What language models of this project use is a short list. The JSON is checked
by it, and what was checked is what the library gets.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from htfa_jax.common.json_files import parse_json
from htfa_jax.errors import HTFAError

MAX_BYTES = 64 * 2**20  # of a file; Gemma's, the largest published one, has 33
MAX_TOKENS = 2**20  # Gemma has 262,144
MAX_CHARACTERS = 1000  # of a token; runs of spaces have 128
MAX_COMPONENTS = 20  # of a list of normalizers, pre-tokenizers or decoders, nested ones included
MAX_MARK = 4  # characters of what stands for a space
# Bytes of a character's normal form; the longest of Unicode has 33.
MAX_NORMAL = 64
MAX_SCORE = 1e6

# Regular expressions that cut text into words. None goes back more than once over a character.
WORDS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # cl100k, as it was and as it is
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    }
)
# Those that `weights_convert` writes of a SentencePiece model that trims spaces.
OUTER_SPACES, INNER_SPACES = r"\A +| +\z", " {2,}"

Refuse = Callable[[str], HTFAError]
Fields = dict[str, Callable[[Any], bool]]


@contextlib.contextmanager
def calling_tokenizers(what: str, error: type[HTFAError]) -> Iterator[None]:
    """A block that calls the tokenizers library, which has no errors of its own.

    Args:
      what: was to be done with which file; messages begin with it.
      error: what is raised instead, also of a panic of its Rust code, which is no `Exception`.
    """
    try:
        yield
    except HTFAError:
        raise
    except Exception as problem:
        raise error(f"{what}: {problem}") from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise error(f"{what}: the tokenizers library gave up: {str(problem)[:200]}") from problem


def open_tokenizer(path: Path, error: type[HTFAError]) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation and padding.

    Raises `error` that names the file, and the component if there is one that is not used here.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise error(f"{path} has {size >> 20} MiB, more than {MAX_BYTES >> 20}")
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    checked = checked_tokenizer(parse_json(content, str(path), error), str(path), error)
    # Not the file's own text, of which two readers might take different keys of the same name.
    text = json.dumps(checked)
    with calling_tokenizers(f"the tokenizer {path} cannot be read", error):
        return tokenizers.Tokenizer.from_str(text)


def checked_tokenizer(raw: dict[str, Any], where: str, error: type[HTFAError]) -> dict[str, Any]:
    """The content of a tokenizer.json, as far as it is used here. Raises `error`."""

    def refuse(reason: str) -> HTFAError:
        return error(f"{where}: {reason}; such a tokenizer is not used here")

    model = raw.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(kind, str) or kind not in MODELS:
        raise refuse(f"model must be an object of type {' or '.join(MODELS)}")
    found: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(raw.get("added_tokens", []), refuse),
        "model": MODELS[kind](model, refuse),
    }
    for name, known in COMPONENTS.items():
        left = [MAX_COMPONENTS]
        found[name] = _component(raw.get(name), known, name, left, refuse)
    if _number_of("Precompiled", found["normalizer"]) > 1:
        raise refuse("normalizer has two Precompiled, of which each makes texts longer")
    return found


def _added_tokens(raw: Any, refuse: Refuse) -> list[dict[str, Any]]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    if not isinstance(raw, list) or len(raw) > MAX_TOKENS:
        raise refuse(f"added_tokens must be a list of at most {MAX_TOKENS} tokens")
    for number, token in enumerate(raw):
        if (
            not isinstance(token, dict)
            or not _is_id(token.get("id"))
            or not _is_token(token.get("content"))
            or not all(_is_flag(token.get(flag, False)) for flag in flags)
        ):
            raise refuse(
                f"added_tokens[{number}] must have an id below {MAX_TOKENS}, a content of 1 to "
                f"{MAX_CHARACTERS} characters, and true or false as {', '.join(flags)}"
            )
    return [
        {"id": t["id"], "content": t["content"], **{flag: t.get(flag, False) for flag in flags}}
        for t in raw
    ]


def _bpe(raw: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    vocab, merges, unknown = raw.get("vocab"), raw.get("merges"), raw.get("unk_token")
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_TOKENS:
        raise refuse(f"model.vocab must be an object of 1 to {MAX_TOKENS} tokens")
    for token, number in vocab.items():
        if not _is_token(token) or not _is_id(number):
            raise refuse(
                f"model.vocab has {token[:40]!r}: tokens have 1 to {MAX_CHARACTERS} characters "
                f"and a number below {MAX_TOKENS}"
            )
    if len(set(vocab.values())) < len(vocab):
        raise refuse("model.vocab has two tokens of one number")
    if not isinstance(merges, list) or len(merges) > 4 * MAX_TOKENS:
        raise refuse(f"model.merges must be a list of at most {4 * MAX_TOKENS} pairs")
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_token, pair)):
            raise refuse(f"model.merges[{number}] must be two tokens")
        if any(token not in vocab for token in (*pair, pair[0] + pair[1])):
            raise refuse(f"model.merges[{number}] has a token that model.vocab lacks")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise refuse("model.unk_token must be a token of model.vocab")
    if raw.get("dropout"):
        raise refuse("model.dropout makes the tokens of a text random")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if raw.get(name) not in (None, ""):
            raise refuse(f"model.{name} is not empty")
    flags = {name: raw.get(name, False) for name in ("fuse_unk", "byte_fallback", "ignore_merges")}
    if not all(map(_is_flag, flags.values())):
        raise refuse(f"{', '.join(flags)} of model must be true or false")
    return {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unknown, **flags} | {
        name: raw[name]
        for name in ("continuing_subword_prefix", "end_of_word_suffix")
        if name in raw
    }


def _unigram(raw: dict[str, Any], refuse: Refuse) -> dict[str, Any]:
    vocab, unknown = raw.get("vocab"), raw.get("unk_id")
    fallback = raw.get("byte_fallback", False)
    if not isinstance(vocab, list) or not 0 < len(vocab) <= MAX_TOKENS:
        raise refuse(f"model.vocab must be a list of 1 to {MAX_TOKENS} tokens")
    for number, row in enumerate(vocab):
        if not isinstance(row, list) or len(row) != 2 or not _is_token(row[0]):
            raise refuse(f"model.vocab[{number}] must be a token and its score")
        if not _is_number(row[1]) or not abs(row[1]) <= MAX_SCORE:
            raise refuse(f"model.vocab[{number}] has a score beyond {MAX_SCORE:.0f}")
    if not _is_id(unknown) or unknown >= len(vocab):
        raise refuse("model.unk_id must be the number of a token of model.vocab")
    if not _is_flag(fallback):
        raise refuse("model.byte_fallback must be true or false")
    return {"type": "Unigram", "vocab": vocab, "unk_id": unknown, "byte_fallback": fallback}


MODELS: dict[str, Callable[[dict[str, Any], Refuse], dict[str, Any]]] = {
    "BPE": _bpe,
    "Unigram": _unigram,
}


def _component(
    raw: Any, known: dict[str, Fields], where: str, left: list[int], refuse: Refuse
) -> dict[str, Any] | None:
    """A checked component with its known fields; None for none.

    Args:
      raw: what the JSON has.
      known: fields of each type, and what they must be.
      where: its place in the file.
      left: how many more there may be.
      refuse: makes the error of a reason.
    """
    if raw is None:
        return None
    left[0] -= 1
    if left[0] < 0:
        raise refuse(f"{where.split('.')[0]} has more than {MAX_COMPONENTS} components")
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "Sequence":
        name = where.split(".")[0] + "s"
        name = {"pre_tokenizers": "pretokenizers", "post_processors": "processors"}.get(name, name)
        inner = raw.get(name)
        if not isinstance(inner, list):
            raise refuse(f"{where}.{name} must be a list")
        parts = [
            _component(each, known, f"{where}.{name}[{i}]", left, refuse)
            for i, each in enumerate(inner)
        ]
        kept = [part for part in parts if part is not None]
        return {"type": "Sequence", name: kept} if kept or not parts else None
    if not isinstance(kind, str) or kind not in known:
        named = repr(kind[:40]) if isinstance(kind, str) else "no type"
        raise refuse(f"{where} is {named}; known are Sequence, {', '.join(known)}")
    fields = {name: raw[name] for name in known[kind] if name in raw}
    for name, is_right in known[kind].items():
        if not is_right(fields.get(name)):
            raise refuse(f"{where}: {kind} with a {name} that is not known")
    if kind in LEFT_OUT:
        return None
    if kind == "Replace" and not _shortens(fields["pattern"], fields["content"]):
        raise refuse(f"{where}: Replace makes texts longer")
    return {"type": kind, **{name: value for name, value in fields.items() if value is not None}}


def _number_of(kind: str, component: dict[str, Any] | None) -> int:
    inner = (component or {}).get("normalizers", ())
    own = component is not None and component["type"] == kind
    return own + sum(_number_of(kind, each) for each in inner)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_flag_or_absent(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_MARK


def _is_character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_MARK


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str | int | None) and value in values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MARK


def _is_replaced(pattern: Any) -> bool:
    """A text, or one of two expressions of spaces."""
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return False
    if "String" in pattern:
        return _is_mark(pattern["String"])
    return pattern.get("Regex") in (OUTER_SPACES, INNER_SPACES)


def _shortens(pattern: dict[str, str], content: str) -> bool:
    """Whether no text grows: twenty replacements by two would make a million of one."""
    shortest = {OUTER_SPACES: 1, INNER_SPACES: 2}.get(pattern.get("Regex", ""))
    return len(content) <= (len(pattern["String"]) if shortest is None else shortest)


def _is_cut(pattern: Any) -> bool:
    """A text, or one of the known expressions of words."""
    if not isinstance(pattern, dict) or len(pattern) != 1:
        return False
    regex = pattern.get("Regex")
    return _is_mark(pattern.get("String")) or (isinstance(regex, str) and regex in WORDS)


def _is_charsmap(value: Any) -> bool:
    """SentencePiece's normal forms: a trie, and the texts that it points to, each ended by NUL."""
    if not isinstance(value, str):
        return False
    try:
        content = base64.b64decode(value, validate=True)
        size = int.from_bytes(content[:4], "little")
        texts = content[4 + size :]
        texts.decode("utf-8")
    except (binascii.Error, ValueError):
        return False
    if len(content) <= 4 + size or size < 4 or size % 4 or not texts.endswith(b"\0"):
        return False
    return max(map(len, texts.split(b"\0"))) <= MAX_NORMAL


_BYTE_LEVEL: Fields = {
    "add_prefix_space": _is_flag_or_absent,
    "trim_offsets": _is_flag_or_absent,
    "use_regex": _is_flag_or_absent,
}
_METASPACE: Fields = {
    "replacement": _is_character,
    "prepend_scheme": _one_of(None, "first", "never", "always"),
    "split": _is_flag_or_absent,
    "add_prefix_space": _is_flag_or_absent,
}
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
# What may stand where, and what its fields must be.
COMPONENTS: dict[str, dict[str, Fields]] = {
    "normalizer": {
        **{form: {} for form in ("NFC", "NFD", "NFKC", "NFKD")},
        "Prepend": {"prepend": _is_mark},
        "Replace": {"pattern": _is_replaced, "content": _is_text},
        "Precompiled": {"precompiled_charsmap": _is_charsmap},
    },
    "pre_tokenizer": {
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
        "Split": {"pattern": _is_cut, "behavior": _one_of(*_BEHAVIOURS), "invert": _is_flag},
        "Digits": {"individual_digits": _is_flag},
    },
    "post_processor": {"ByteLevel": _BYTE_LEVEL, "TemplateProcessing": {}},
    "decoder": {
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
        "ByteFallback": {},
        "Fuse": {},
        "Replace": {"pattern": _is_replaced, "content": _is_text},
        "Strip": {"content": _is_character, "start": _is_count, "stop": _one_of(0)},
    },
}
# It adds special tokens, which chat templates write themselves.
LEFT_OUT = frozenset({"TemplateProcessing"})
