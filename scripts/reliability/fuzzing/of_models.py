"""The readers of configurations, tokenizers, weights and checkpoints."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy
from fuzzing.alter import LETTERS, NUMBERS, altered, flipped, json_bytes, text, value
from fuzzing.reader import Reader, written

from htfa_jax.checkpoints import integrity, weights
from htfa_jax.checkpoints.manager import load_frozen
from htfa_jax.checkpoints.meta import FILE, read_meta
from htfa_jax.config import Config, PretrainedConfig, leaves, load_config, override
from htfa_jax.config.io import to_dict
from htfa_jax.config.renamed import current_scores
from htfa_jax.data.records import Turn
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import CheckpointError
from htfa_jax.inference.export import evaluations
from htfa_jax.inference.model_card import model_card
from weights_convert.info import describe_source
from weights_convert.source import Source
from weights_convert.tokenizer import convert_tokenizer

CONFIG = to_dict(Config())
FIELDS = [name for name, _ in leaves(Config())]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = [
    "{{", "}}", "{%", "%}", "{% for m in messages %}", "{% endfor %}", "{% if ", "{% endif %}",
    "m['content']", "m.role", "messages", "[0]", "[9]", ".x", "|tojson", "|length", "|first", "1/0",
    "range(10**9)", "'a' * 10**12", "raise_exception('x')", "self", "cycler.__init__.__globals__",
    "().__class__.__base__.__subclasses__()", "{% include '/etc/passwd' %}", "{% break %}",
    "{% set x = namespace(a=1) %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "<|im_end|>",
    "{{ m['content'] }}", "{{ messages[0]['content'] }}", "add_generation_prompt", "lipsum(10**6)",
    "{{ 10**10**9 }}", "{{ messages * 10**9 }}", "{{ 'x' * 99999 }}",
]  # fmt: skip
WORDS = ("<|im_end|>", "<|im_start|>assistant\n", "<s>", "{{ 1 }}", "\udcff", "\x00", "  a  ")
ASKED = (Turn("user", "a?"), Turn("assistant", "red xxxxxxxx aaaa  b"))
# Components of tokenizers, some of which the library would hang or stop at.
COMPONENTS = [
    {"type": "Strip", "content": "a", "start": 10**6, "stop": 10**6},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
    {"type": "Replace", "pattern": {"Regex": "(a|a)*(b|b)*(x+x+)+y"}, "content": ""},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
        struct.pack("<3I", 8, 2**31 - 1, 77) + b"a\0").decode()},
    {"type": "Prepend", "prepend": "x" * 10**5},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Digits", "individual_digits": True}, {"type": "NFKC"}, {"type": "Fuse"},
    {"type": "ByteFallback"}, {"type": "Lowercase"}, {"type": "BertNormalizer"}, {"type": "CTC"},
]  # fmt: skip
LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
SOURCE = {"model_type": "siglip", "vision_config": {"hidden_act": "gelu_pytorch_tanh"}}
# A safetensors file of two tensors, and one of a weight folder.
WEIGHTS = safetensors.numpy.save(
    {
        "vision_model.post_layernorm.weight": np.ones(4, np.float32),
        "vision_model.embeddings.patch_embedding.weight": np.ones((4, 3, 2, 2), np.float16),
    },
    metadata={"format": "pt"},
)
DTYPES = ("F64", "F32", "F16", "BF16", "F4", "F8_E4M3", "I64", "U8", "BOOL", "C64", "F33", "")
SCORES = {
    "step": 7,
    "samples": 5,
    "answers": {"color": {"all": {"accuracy": 0.5}}},
    "images": {"all": {"completed": {"psnr": 20.0}}},
}
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}},
    "additional_special_tokens": ["<|im_start|>"],
}


def safetensors_bytes(rng: Random) -> bytes:
    """A safetensors file, of types and axes at random, or with altered bytes."""
    if rng.randrange(2):
        return flipped(rng, WEIGHTS)
    shape = [1] * rng.choice((0, 1, 4, 8, 9, 100))
    entry = {
        "dtype": rng.choice(DTYPES),
        "shape": shape,
        "data_offsets": [0, rng.choice((1, 2, 4, 8))],
    }
    header = json.dumps(altered(rng, {"a": entry})).encode("utf-8", "replace")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + rng.randbytes(entry["data_offsets"][1])


def sentencepiece_bytes() -> bytes:
    """A small SentencePiece model."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -1.0, 1), ("a", -2.0, 1)]
    pieces += [("b", -3.0, 1), ("ab", -0.5, 1), ("<0x41>", 0.0, 6), ("user", 0.0, 4)]
    found = b""
    for word, score, kind in pieces:
        score_field = b"\x15" + struct.pack("<f", score)
        found += field(1, field(1, word.encode()) + score_field + bytes([0x18, kind]))
    return found + field(2, b"\x18\x02") + field(3, b"\x18\x01\x20\x01")


def tokenizer_json(rng: Random, original: dict[str, Any]) -> bytes:
    """A tokenizer.json with other components, or altered elsewhere."""
    made = dict(original)
    for name, inner in LISTS.items():
        if not rng.randrange(3):
            parts = [rng.choice(COMPONENTS) for _ in range(rng.randrange(1, 4))]
            made[name] = parts[0] if len(parts) == 1 else {"type": "Sequence", inner: parts}
    if not rng.randrange(6):
        made["post_processor"] = rng.choice(COMPONENTS)
    if not rng.randrange(4):
        rows = [["<unk>", 0.0], ["▁", -1.0], ["a", rng.choice((-2.0, 1e300))], ["re", -1.5]]
        made["model"] = {"type": "Unigram", "unk_id": rng.choice((0, 0, None)), "vocab": rows}
    return json_bytes(rng, made) if rng.randrange(2) else json.dumps(made).encode()


def readers(folder: Path) -> dict[str, Reader]:
    """The readers by name, with files in an existing folder of their own."""
    train_tokenizer(["user", "assistant", "red"], 270, folder / "tokenizer")
    sound = ChatTokenizer(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "theirs")
    small = json.loads((folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
    template_settings = folder / "theirs/tokenizer_config.json"
    checkpoint, files = folder / "run/checkpoints/7", {
        "_CHECKPOINT_METADATA": b'{"commit_timestamp_nsecs": 5000000000}',
        "metrics/metrics": b'{"loss": 0.5}',
        "params/d": b"weights",
        FILE: b"{}",
    }  # fmt: skip
    for name, content in files.items():
        written(checkpoint / name, content)
    integrity.write_hashes(checkpoint)
    files["hashes.json"] = (checkpoint / "hashes.json").read_bytes()
    meta = {"step": 7, "samples": 8, "frozen": {}, "window": [{"loss": 1.0}]}
    weights.save_component(folder / "vq", "vq", Config().vq, {"a": np.zeros(2, np.float32)})
    vq = json.loads((folder / "vq/config.json").read_text(encoding="utf-8"))
    told = {name.split(".")[1]: value for name, value in (
        ("level1.num_scales", 3), ("level2.num_heads", 8), ("level3.adapter_mlp_dim", 64),
        ("level3.adapter_norm", True))}  # fmt: skip
    levels = {"family": "htfa", "codebook_dim": 8, "codebook_size": 16384, **told}
    model = sentencepiece_bytes()

    def read_config(content: bytes) -> None:
        load_config(written(folder / "config.json", content))

    def read_template(given: str) -> None:
        template_settings.write_text(json.dumps(settings | {"chat_template": given}))
        ChatTokenizer(folder / "theirs").encode(ASKED)

    def read_settings(content: bytes) -> None:
        written(template_settings, content)
        ChatTokenizer(folder / "theirs").encode(ASKED)

    def read_tokenizer(content: bytes) -> None:
        written(folder / "other/tokenizer.json", content)
        written(folder / "other/tokenizer_config.json", json.dumps(settings).encode())
        tokenizer = ChatTokenizer(folder / "other")
        tokenizer.decode(tokenizer.encode(ASKED).tokens.tolist() + [5, 2**31])
        tokenizer.encode_prompt((Turn("user", " <s>  {\n é ax▁ " * 20),))

    def read_labels(given: tuple[Turn, ...]) -> None:
        """What is learned of a conversation is what its assistant says."""
        found = sound.encode(given)
        said = "".join(turn.text + "<|im_end|>" for turn in given if turn.role == "assistant")
        learned = found.tokens[found.learned].tolist()
        words = sound._tokenizer.decode(learned, skip_special_tokens=False)
        assert words == said, (words, said)

    def read_foreign(given: dict[str, bytes]) -> None:
        found = {name: written(folder / "foreign" / name, c) for name, c in given.items()}
        convert_tokenizer(found, folder / "converted")

    def read_checkpoint(given: tuple[str, bytes]) -> None:
        """The list of a run's checkpoints, and their verification, with one file altered."""
        name, content = given
        written(checkpoint / name, content)
        integrity.checkpoint_table(integrity.listing(folder / "run"), None, {})
        problem = integrity.damage(checkpoint)
        written(checkpoint / name, files[name])
        # Times may change, and the space between hashes.
        free = name in ("_CHECKPOINT_METADATA", "hashes.json") or content == files[name]
        assert problem or free, given
        if problem:
            raise CheckpointError(problem)

    def read_meta_of(content: bytes) -> None:
        written(folder / "other run/7" / FILE, content)
        found = read_meta(folder / "other run/7")
        sum(step["loss"] for step in found["window"] if "loss" in step)
        load_frozen(folder, found["frozen"])

    def read_source(given: tuple[bytes, bytes]) -> None:
        written(folder / "source/model.safetensors", given[0])
        written(folder / "source/config.json", given[1])
        source = Source(folder / "source")
        describe_source(source)
        for key in source.keys:  # noqa: SIM118
            source.read(key)

    def read_folder(given: tuple[bytes, bytes, bytes]) -> None:
        for name, description in (("other vq", given[0]), ("levels", given[1])):
            written(folder / name / weights.CONFIG, description)
            written(folder / name / weights.WEIGHTS, given[2])
        base = Config()
        named = PretrainedConfig(vq=str(folder / "other vq"), htfa=str(folder / "levels"))
        config = weights.with_sizes(dataclasses.replace(base, pretrained=named), base)
        weights.load_levels(config, {})
        weights.load_component(folder / "other vq", "vq", config.vq, {}, unused=".*")

    def read_scores(content: bytes) -> None:
        written(folder / "run/evaluation/test/metrics.json", content)
        found = evaluations(folder / "run", 7)
        if found:
            scores = current_scores(json.loads(found["test"]["metrics.json"]))
            model_card("name", Config(), 7, {}, "float32", scores, None, None)

    def turns(rng: Random) -> tuple[Turn, ...]:
        roles = ("user", "assistant", "system")
        return tuple(
            Turn(rng.choice(roles), rng.choice(WORDS) if rng.randrange(2) else text(rng, 20))
            for _ in range(rng.randrange(1, 5))
        )

    def templates(rng: Random) -> str:
        if rng.randrange(2):
            return flipped(rng, TEMPLATE.encode()).decode(errors="replace")
        return "".join(
            rng.choice(PIECES) if rng.randrange(6) else rng.choice(LETTERS)
            for _ in range(rng.randrange(8))
        )

    def overrides(rng: Random) -> dict[str, Any]:
        names = [
            rng.choice(FIELDS) if rng.randrange(5) else text(rng)
            for _ in range(rng.randrange(1, 4))
        ]
        return {name: rng.choice(NUMBERS) if rng.randrange(2) else value(rng) for name in names}

    def foreign(rng: Random) -> dict[str, bytes]:
        made = {"tokenizer_config.json": json_bytes(rng, SETTINGS)}
        if rng.randrange(2):
            made["tokenizer.json"] = tokenizer_json(rng, small)
        else:
            made["tokenizer.model"] = flipped(rng, model) if rng.randrange(2) else model
        if not rng.randrange(3):
            made["added_tokens.json"] = json_bytes(rng, {"<new>": 9})
        if not rng.randrange(3):
            made["special_tokens_map.json"] = json_bytes(rng, SETTINGS)
        if not rng.randrange(3):
            made["chat_template.jinja"] = flipped(rng, TEMPLATE.encode())
        return made

    def one_file(rng: Random) -> tuple[str, bytes]:
        name = rng.choice(sorted(files))
        return name, flipped(rng, files[name])

    return {
        "config.json": Reader(lambda rng: json_bytes(rng, CONFIG), read_config),
        "overrides": Reader(overrides, lambda changes: override(Config(), changes)),
        "chat template": Reader(templates, read_template),
        "tokenizer_config.json": Reader(lambda rng: json_bytes(rng, settings), read_settings),
        "tokenizer.json": Reader(lambda rng: tokenizer_json(rng, small), read_tokenizer),
        "labels": Reader(turns, read_labels),
        "tokenizer to convert": Reader(foreign, read_foreign),
        "weights to convert": Reader(
            lambda rng: (safetensors_bytes(rng), json_bytes(rng, SOURCE)), read_source
        ),
        "weight folder": Reader(
            lambda rng: (json_bytes(rng, vq), json_bytes(rng, levels), safetensors_bytes(rng)),
            read_folder,
        ),
        "checkpoint": Reader(one_file, read_checkpoint),
        "checkpoint's meta": Reader(lambda rng: json_bytes(rng, meta), read_meta_of),
        "metrics.json": Reader(lambda rng: json_bytes(rng, SCORES), read_scores),
    }
