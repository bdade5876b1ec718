"""Feeds made-up input to everything that reads what others wrote.

    python scripts/reliability/fuzz.py --inputs 100000

Each reader may answer or raise one of the project's own errors; anything else is a bug, which
hypothesis shrinks to its smallest input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from htfa_jax.checkpoints import integrity
from htfa_jax.common.cli import parse
from htfa_jax.config import Config, leaves, load_config, override
from htfa_jax.config.io import to_dict
from htfa_jax.data.records import Turn, parse_record
from htfa_jax.data.storage import ImageRoot
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import HTFAError
from weights_convert.info import describe_source
from weights_convert.source import Source

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 1e-9, 1e308, math.nan, math.inf, 10**9, 10**30, 10**400])

RECORD = {
    "id": "r0",
    "image_orig": "a.png",
    "image_recon": "b.png",
    "object_mask": "m.png",
    "bbox_orig": [1, 2, 3, 4],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?", "kind": "color"},
        {"from": "gpt", "value": "red"},
    ],
    "meta": {"occlusion": 0.4},
}
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
]  # fmt: skip


@st.composite
def altered(draw: Callable, original: Any) -> Any:
    """A JSON value in a few places of which there is another value, one more, or none."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(0, 3))):
        node, key, parent = value, None, None
        while isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
            parent = node
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            node = node[key]
        if parent is None:
            value = draw(JSON)
        elif draw(st.booleans()):
            parent[key] = draw(JSON | NUMBERS)
        elif isinstance(parent, dict):
            parent.pop(key)
        else:
            parent.append(draw(JSON))
    return value


@st.composite
def flipped(draw: Callable, original: bytes) -> bytes:
    """Bytes of which some were changed, left out, or put between."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["change", "cut", "insert", "replace"]))
        if how == "change" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[at : at + draw(st.integers(0, 40))]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=6))
        else:
            content[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"[" * 3000, b"9" * 5000]))
    return bytes(content)


SOURCE = {"model_type": "siglip", "vision_config": {"hidden_act": "gelu_pytorch_tanh"}}
# A safetensors file of two tensors.
WEIGHTS = safetensors.numpy.save(
    {
        "vision_model.post_layernorm.weight": np.ones(4, np.float32),
        "vision_model.embeddings.patch_embedding.weight": np.ones((4, 3, 2, 2), np.float16),
    },
    metadata={"format": "pt"},
)


def turns() -> st.SearchStrategy:
    """Conversations, tokens of the template among their words."""
    words = st.text(max_size=20) | st.sampled_from(
        ["<|im_end|>", "<|im_start|>assistant\n", "<s>", "{{ 1 }}", "\udcff", "\x00", "  a  "]
    )
    role = st.sampled_from(["user", "assistant", "system"])
    return st.lists(st.builds(Turn, role, words.map(str)), min_size=1, max_size=4).map(tuple)


class Targets:
    """The readers, on files in a folder of their own.

    Args:
      folder: an existing one.

    Attributes:
      all: by name, what a reader is fed and the reader.
    """

    def __init__(self, folder: Path):
        self.folder, self.run, self.weights = folder, folder / "run", folder / "weights"
        self.weights.mkdir()
        train_tokenizer(["user", "assistant", "red"], 270, folder / "tokenizer")
        self.tokenizer = ChatTokenizer(folder / "tokenizer")
        self.settings = folder / "tokenizer/tokenizer_config.json"
        self.settings_before = json.loads(self.settings.read_text(encoding="utf-8"))
        self.checkpoint = folder / "run/checkpoints/7"
        self.files = {
            "_CHECKPOINT_METADATA": b'{"commit_timestamp_nsecs": 5000000000}',
            "metrics/metrics": b'{"loss": 0.5}',
            "params/d": b"weights",
            "meta/metadata": b"{}",
        }
        for name, content in self.files.items():
            (self.checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkpoint / name).write_bytes(content)
        integrity.write_hashes(self.checkpoint)
        self.files["hashes.json"] = (self.checkpoint / "hashes.json").read_bytes()
        pieces = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=7)
        names = st.sampled_from(sorted(self.files))
        overrides = st.dictionaries(
            st.sampled_from(FIELDS) | st.text(max_size=9), NUMBERS | JSON, max_size=3
        )
        self.all: dict[str, tuple[st.SearchStrategy, Callable[[Any], None]]] = {
            "record": (altered(RECORD) | JSON, self.read_record),
            "config.json": (altered(CONFIG) | JSON, self.read_config),
            "overrides": (overrides, self.read_overrides),
            "template": (
                pieces.map("".join)
                | flipped(TEMPLATE.encode()).map(lambda x: x.decode(errors="replace")),
                self.read_template,
            ),
            "labels": (turns(), self.build_labels),
            "checkpoint": (
                names.flatmap(lambda n: st.tuples(st.just(n), flipped(self.files[n]))).filter(
                    lambda given: given[1] != self.files[given[0]]
                ),
                self.read_checkpoint,
            ),
            "weights": (
                st.tuples(flipped(WEIGHTS), altered(SOURCE)),
                self.read_weights,
            ),
        }

    def read_record(self, raw: Any) -> None:
        """The record reader."""
        parse_record(raw, "here", ImageRoot("root"))

    def read_config(self, content: Any) -> None:
        """A run's config.json."""
        path = self.folder / "config.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        load_config(path)

    def read_overrides(self, changes: dict[str, Any]) -> None:
        """Fields changed by dotted name."""
        override(Config(), changes)

    def read_template(self, text: str) -> None:
        """A tokenizer folder with a chat template of any kind."""
        settings = json.dumps(self.settings_before | {"chat_template": text})
        self.settings.write_text(settings, encoding="utf-8")
        ChatTokenizer(self.settings.parent).encode((Turn("user", "a?"), Turn("assistant", "b")))

    def build_labels(self, given: tuple[Turn, ...]) -> None:
        """The label builder: what is learned of a conversation is what its assistant says."""
        found = self.tokenizer.encode(given)
        said = "".join(turn.text + "<|im_end|>" for turn in given if turn.role == "assistant")
        words = self.tokenizer._tokenizer.decode(
            found.tokens[found.learned].tolist(), skip_special_tokens=False
        )
        assert words == said, (words, said)

    def read_checkpoint(self, given: tuple[str, bytes]) -> None:
        """The list of a run's checkpoints, and their verification, with one file altered."""
        name, content = given
        (self.checkpoint / name).write_bytes(content)
        integrity.checkpoint_table(integrity.listing(self.run), None, {})
        problem = integrity.damage(self.checkpoint)
        (self.checkpoint / name).write_bytes(self.files[name])
        # Times may change, and the space between hashes.
        assert problem or name in ("_CHECKPOINT_METADATA", "hashes.json"), given

    def read_weights(self, given: tuple[bytes, Any]) -> None:
        """`weights_convert info` of a safetensors file and its config.json."""
        content, config = given
        (self.weights / "model.safetensors").write_bytes(content)
        (self.weights / "config.json").write_text(json.dumps(config), encoding="utf-8")
        describe_source(Source(self.weights))


def feed(targets: Targets, name: str, inputs: int) -> None:
    """Feeds a reader. Raises what it raises, if that is no error of the project."""
    strategy, reader = targets.all[name]

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def once(value: Any) -> None:
        with contextlib.suppress(HTFAError):
            reader(value)

    once()


@dataclasses.dataclass(frozen=True)
class FuzzArgs:
    """Options of the command."""

    inputs: int = 100_000  # of all readers together


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(FuzzArgs, argv, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        for name in targets.all:
            started = time.monotonic()
            feed(targets, name, -(-args.inputs // len(targets.all)))
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
