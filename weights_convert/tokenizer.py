"""Tokenizers of published language models as folders that `ChatTokenizer` reads.

A checkpoint with tokenizer.json keeps it. InternLM2, InternVL2 and older Llamas have a
SentencePiece model instead, and some bring Python code to read it. Here the model's file is read
directly, so that no downloaded code runs and neither `transformers` nor `sentencepiece` is needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from htfa_jax.common.files import write_whole
from htfa_jax.common.json_files import read_json
from htfa_jax.data.chat_template import read_template
from htfa_jax.data.tokenizer import CHAT_TEMPLATE, ChatTokenizer
from htfa_jax.data.tokenizer_file import (
    MAX_CHARACTERS,
    MAX_TOKENS,
    calling_tokenizers,
    open_tokenizer,
)
from htfa_jax.errors import CheckpointError, DataError
from weights_convert.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    read_sentencepiece,
)
from weights_convert.source import Source

log = logging.getLogger(__name__)

SPACE = "▁"

# What a tokenizer may consist of.
FILES = {
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}


def convert_tokenizer(files: Mapping[str, Path], out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a checkpoint's tokenizer.

    Without a chat template of its own it gets InternLM2's, and a warning is logged.

    Args:
      files: {name: local path} of what the checkpoint has among tokenizer.json (kept byte for
        byte), tokenizer.model, tokenizer_config.json, special_tokens_map.json,
        added_tokens.json and chat_template.jinja. Other names are not read.
      out: the folder to write, made if missing.

    Raises:
      CheckpointError: no tokenizer, a damaged file, a SentencePiece model of an unsupported
        kind, or tokens whose ids contradict each other.
    """
    config = _read_json(files, "tokenizer_config.json")
    settings = _read_json(files, "special_tokens_map.json") | config
    added = _added(files, config, settings)

    if "tokenizer.json" in files:
        path = files["tokenizer.json"]
        tokenizer, data = open_tokenizer(path, CheckpointError), path.read_bytes()
    elif "tokenizer.model" in files:
        path = files["tokenizer.model"]
        model = read_sentencepiece(path)
        # As in transformers, a Llama without "legacy": false has the prefix everywhere.
        everywhere = settings.get("legacy") is not False
        with calling_tokenizers(f"no tokenizer can be made of {path}", CheckpointError):
            tokenizer = _build(path, model, added, everywhere)
        data = tokenizer.to_str(pretty=True).encode()
        if not config:
            for name, i in (("bos_token", model.bos_id), ("eos_token", model.eos_id)):
                if i < len(model.pieces):
                    settings.setdefault(name, model.pieces[i].text)
    else:
        raise CheckpointError("the checkpoint has neither tokenizer.json nor tokenizer.model")

    with calling_tokenizers(f"the tokenizer {path} fails", CheckpointError):
        _check_tokens(path, tokenizer, added, settings)
    settings["chat_template"] = _chat_template(files, tokenizer, settings)
    # The checkpoint's own class may be downloaded code, which tokenizer.json replaces.
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_whole(out / "tokenizer_config.json", text)
    # The settings first: a folder with tokenizer.json is complete.
    write_whole(out / "tokenizer.json", data)
    try:
        ChatTokenizer(out)
    except DataError as error:
        raise CheckpointError(f"the tokenizer cannot be used: {error}") from error


def _build(
    path: Path, model: SentencePieceModel, added: Mapping[int, dict], everywhere: bool
) -> Tokenizer:
    """The fast tokenizer of a SentencePiece model and of the checkpoint's added tokens by id.

    With `everywhere` the dummy prefix goes behind every added token too, not only before the
    whole text.
    """
    tokens = _added_tokens(model.pieces, added)
    pieces = list(model.pieces)
    for i, token in sorted(tokens.items()):
        if i > len(pieces):
            raise CheckpointError(
                f"added token {token.content!r} of {path} has id {i}, but {len(pieces)} is missing"
            )
        # InternLM2 gives pieces like [UNUSED_TOKEN_146] new names; other tokens come behind.
        pieces[i : i + 1] = [Piece(token.content, 0.0, USER_DEFINED)]
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    for i, piece in enumerate(pieces):
        if vocab[piece.text] != i:
            raise CheckpointError(f"{piece.text!r} of {path} is token {i} and {vocab[piece.text]}")

    # Bytes and tokens that stand for no text are never spelled.
    scores = {
        piece.text: piece.score
        for i, piece in enumerate(pieces)
        if i not in tokens and piece.kind in (NORMAL, USER_DEFINED)
    }
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    if model.model_type == "bpe":
        core = BPE(
            vocab,
            _merges(scores),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    elif model.model_type == "unigram":
        # Unigram has no types: what must not be spelled is made dearer than its characters.
        rows = [(piece.text, scores.get(piece.text, -1e4)) for piece in pieces]
        core = Unigram(rows, unknown, model.byte_fallback)
    else:
        raise CheckpointError(
            f"{path} is a SentencePiece model of type {model.model_type}; bpe and unigram are "
            "supported"
        )

    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model, everywhere))
    if model.add_dummy_prefix and not everywhere:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.trim:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens([token for _, token in sorted(tokens.items())])
    return tokenizer


def _added_tokens(pieces: list[Piece], added: Mapping[int, dict]) -> dict[int, AddedToken]:
    """{id: token} of what is found in a text before anything else happens to it."""
    found = {}
    for i, piece in enumerate(pieces):
        # A user's piece with a space in it can only be found after spaces are replaced. It is
        # left to the merges, where its score 0 makes it come first.
        raw = piece.kind == USER_DEFINED and SPACE not in piece.text
        if raw or piece.kind in (UNKNOWN, CONTROL):
            found[i] = {"content": piece.text, "special": not raw}
    return {
        i: AddedToken(
            token["content"],
            single_word=token.get("single_word", False),
            lstrip=token.get("lstrip", False),
            rstrip=token.get("rstrip", False),
            # The original looks for them in the raw text, whatever the field says.
            normalized=False,
            special=token.get("special", False),
        )
        for i, token in (found | added).items()
    }


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, the best piece first.

    SentencePiece has no list of merges: it joins the neighbours whose union scores best. Of
    several ways to make the same piece the longer left half comes first, since runs of a
    character grow from the left.
    """
    found = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _normalizers(model: SentencePieceModel, everywhere: bool) -> list[normalizers.Normalizer]:
    steps = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.trim:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix and everywhere:
        steps.append(normalizers.Prepend(" "))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _check_tokens(
    path: Path, tokenizer: Tokenizer, added: Mapping[int, dict], settings: Mapping
) -> None:
    """Raises CheckpointError unless `tokenizer` has the tokens that the settings name."""
    for i, token in added.items():
        found = tokenizer.token_to_id(token["content"])
        if found != i:
            raise CheckpointError(
                f"{token['content']!r} should be token {i}, but in {path} it is {found}"
            )
    for name in ("bos_token", "eos_token"):
        content = _content(settings.get(name))
        if content is not None and tokenizer.token_to_id(content) is None:
            raise CheckpointError(f"{name} is {content!r}, which is not a token of {path}")


def _chat_template(files: Mapping[str, Path], tokenizer: Tokenizer, settings: Mapping):
    """The checkpoint's template, in its own file or in the settings, else InternLM2's."""
    if "chat_template.jinja" in files:
        return read_template(files["chat_template.jinja"], CheckpointError)
    if settings.get("chat_template"):
        return settings["chat_template"]
    split = [t for t in ("<|im_start|>", "<|im_end|>") if tokenizer.token_to_id(t) is None]
    log.warning(
        "the checkpoint has no chat template: InternLM2's is used%s",
        f", although {' and '.join(split)} are not tokens of it" if split else "",
    )
    return CHAT_TEMPLATE


def _read_json(files: Mapping[str, Path], name: str) -> dict:
    """A settings file without its nulls; empty where the checkpoint has none."""
    if name not in files:
        return {}
    settings = read_json(files[name], CheckpointError, allow_nan=True)
    return {key: value for key, value in settings.items() if value is not None}


def _added(files: Mapping[str, Path], config: Mapping, settings: Mapping) -> dict[int, dict]:
    """{id: token} of what tokenizer_config.json and added_tokens.json add, checked."""
    where = files.get("tokenizer_config.json") or files.get("added_tokens.json")
    named = config.get("added_tokens_decoder", {})
    if not isinstance(named, dict):
        raise CheckpointError(f"{where}: added_tokens_decoder must be an object of tokens by id")
    added: dict[int, dict] = {}
    for key, token in named.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 7) or not isinstance(token, dict):
            raise CheckpointError(
                f"{where}: added_tokens_decoder has {key[:40]!r}, which is no id with a token"
            )
        added[int(key)] = token
    beside = _read_json(files, "added_tokens.json")
    special = _special(settings)
    for content, i in beside.items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise CheckpointError(
                f"{files['added_tokens.json']}: {content[:40]!r} must have a number as its id"
            )
        added.setdefault(i, {"content": content, "special": content in special})
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for i, token in added.items():
        content = token.get("content")
        right = isinstance(content, str) and 0 < len(content) <= MAX_CHARACTERS
        if not right or not 0 <= i < MAX_TOKENS:
            raise CheckpointError(
                f"{where}: the added token {str(i)[:20]} must have an id below {MAX_TOKENS} and "
                f"a content of 1 to {MAX_CHARACTERS} characters"
            )
        if not all(isinstance(token.get(flag, False), bool) for flag in flags):
            raise CheckpointError(
                f"{where}: {', '.join(flags)} of the added token {i} must be true or false"
            )
    return added


def _special(settings: Mapping) -> set[str]:
    """Contents of all tokens that a checkpoint's settings name."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    more = settings.get("additional_special_tokens", [])
    named += more if isinstance(more, list) else []
    return {content for value in named if (content := _content(value)) is not None}


def _content(token) -> str | None:
    """A token's text, of which settings write the text or an object with the text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def tokenizer_of(source: Source, family: str) -> Callable[[Path], None] | None:
    """What writes the tokenizer of a language model into its weight folder; None without one."""
    files = sorted(FILES & set(source.files.names))
    if family != "internlm2" or not {"tokenizer.json", "tokenizer.model"} & set(files):
        return None
    return lambda folder: convert_tokenizer({n: source.files.get(n) for n in files}, folder)
