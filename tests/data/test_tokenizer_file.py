"""Tokenizers of others: what is used here is read, everything else is a sentence."""

import base64
import json
import struct
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from htfa_jax.data import tokenizer_file
from htfa_jax.data.records import Turn
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.data.tokenizer_file import (
    INNER_SPACES,
    OUTER_SPACES,
    WORDS,
    calling_tokenizers,
    open_tokenizer,
)
from htfa_jax.errors import CheckpointError, DataError

TALK = (Turn("user", "What is it?"), Turn("assistant", "red xxxx  'll 12"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user", "assistant", "red"], 280, folder)
    return folder


@pytest.fixture
def changed(trained, tmp_path):
    """A function: the tokenizer's folder, with other fields in its tokenizer.json."""

    def change(**fields):
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        for path in trained.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = json.loads((trained / "tokenizer.json").read_text()) | fields
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return change


def charsmap(*units, texts=b"a\0"):
    trie = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + texts).decode()


def precompiled(content):
    return {"type": "Precompiled", "precompiled_charsmap": content}


def bpe(vocab, *merges, **fields):
    return {"type": "BPE", "vocab": vocab, "merges": list(merges), **fields}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def unigram(*rows, unk_id=0, **fields):
    return {"type": "Unigram", "unk_id": unk_id, "vocab": [["<unk>", 0.0], *rows], **fields}


def sequence(name, *parts):
    return {"type": "Sequence", name: list(parts)}


NESTED = {"type": "NFC"}
for _ in range(30):
    NESTED = sequence("normalizers", NESTED)

REFUSED = {
    # These end or hang the library.
    "Strip that cuts too much": (
        "decoder",
        {"type": "Strip", "content": "a", "start": 10**6, "stop": 10**6},
        "decoder: Strip",
    ),
    "Strip at the end": (
        "decoder",
        {"type": "Strip", "content": "a", "start": 0, "stop": 1},
        "decoder: Strip",
    ),
    "nothing replaced": ("normalizer", replace({"String": ""}, "xx"), "normalizer: Replace"),
    "an empty expression replaced": (
        "normalizer",
        replace({"Regex": ""}, "xx"),
        "normalizer: Replace",
    ),
    "an expression that goes back": (
        "normalizer",
        replace({"Regex": "(a|a)*(b|b)*(x+x+)+y"}, ""),
        "normalizer: Replace",
    ),
    "words that go back": ("pre_tokenizer", split({"Regex": "(x+x+)+y"}), "pre_tokenizer: Split"),
    "a charsmap cut off": ("normalizer", precompiled("AAAA"), "normalizer: Precompiled"),
    "a charsmap that is none": ("normalizer", precompiled("?"), "normalizer: Precompiled"),
    "a charsmap that grows": (
        "normalizer",
        precompiled(charsmap(0, texts=b"a" * 99 + b"\0")),
        "normalizer: Precompiled",
    ),
    "two charsmaps": (
        "normalizer",
        sequence("normalizers", *[precompiled(charsmap(0))] * 2),
        "two Precompiled",
    ),
    "a long prefix": (
        "normalizer",
        {"type": "Prepend", "prepend": "x" * 10**6},
        "normalizer: Prepend",
    ),
    "a length of nothing": (
        "pre_tokenizer",
        {"type": "FixedLength", "length": 0},
        "pre_tokenizer is 'FixedLength'",
    ),
    "texts that grow": ("normalizer", replace({"String": "a"}, "aa"), "makes texts longer"),
    "spaces that grow": ("decoder", replace({"Regex": OUTER_SPACES}, "ab"), "makes texts longer"),
    "many": (
        "normalizer",
        sequence("normalizers", *[{"type": "NFC"}] * 30),
        "more than 20 components",
    ),
    "deep": ("normalizer", NESTED, "more than 20 components"),
    "not used here": (
        "normalizer",
        {"type": "BertNormalizer"},
        "normalizer is 'BertNormalizer'; known are",
    ),
    "in a list": (
        "decoder",
        sequence("decoders", {"type": "Fuse"}, {"type": "CTC"}),
        r"decoder.decoders\[1\] is 'CTC'",
    ),
    "no list": ("decoder", {"type": "Sequence"}, "decoder.decoders must be a list"),
    "no type": ("decoder", [1], "decoder is no type"),
    "no model": ("model", None, "model must be an object"),
    "another model": ("model", {"type": ["BPE"]}, "model must be an object"),
    "no unknown token": (
        "model",
        {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]},
        "unk_id",
    ),
    "empty piece": ("model", unigram(["", 0.0]), r"model.vocab\[1\] must be a token"),
    "score": ("model", unigram(["a", 1e300]), r"model.vocab\[1\] has a score"),
    "a prefix that cuts letters": (
        "model",
        bpe({"é": 0}, continuing_subword_prefix="é"),
        "continuing_subword_prefix is not empty",
    ),
    "dropout": ("model", bpe({"a": 0}, dropout=0.5), "random"),
    "two of one number": ("model", bpe({"a": 0, "b": 0}), "two tokens of one number"),
    "a number too large": ("model", bpe({"a": 2**31}), "number below"),
    "a merge of nothing": ("model", bpe({"a": 0}, ["a", "a"]), r"merges\[0\] has a token"),
    "no merge": ("model", bpe({"a": 0}, 7), r"merges\[0\] must be two"),
    "a long token": ("model", bpe({"a" * 1001: 0}), "1 to 1000"),
    "unknown token": ("model", bpe({"a": 0}, unk_token="b"), "unk_token"),
    "added number": ("added_tokens", [{"id": -1, "content": "x"}], r"added_tokens\[0\]"),
    "added nothing": ("added_tokens", [{"id": 1, "content": ""}], r"added_tokens\[0\]"),
    "added flag": ("added_tokens", [{"id": 1, "content": "x", "lstrip": 1}], r"added_tokens\[0\]"),
    "added no list": ("added_tokens", {}, "added_tokens must be a list"),
}


@pytest.mark.parametrize("field,value,reason", REFUSED.values(), ids=REFUSED)
def test_what_is_not_used_here_is_a_sentence(changed, field, value, reason):
    folder = changed(**{field: value})
    with pytest.raises(DataError, match=f"tokenizer.json: .*{reason}"):
        ChatTokenizer(folder)


USED = {
    "null": ("normalizer", None),
    "forms": ("normalizer", sequence("normalizers", {"type": "NFC"}, {"type": "NFKD"})),
    "Llama 2": (
        "normalizer",
        sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),
    ),
    "spaces": (
        "normalizer",
        sequence(
            "normalizers",
            replace({"Regex": OUTER_SPACES}, ""),
            replace({"Regex": INNER_SPACES}, " "),
        ),
    ),
    "digits": (
        "pre_tokenizer",
        sequence(
            "pretokenizers",
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ),
    ),
    "template without a template": (
        "post_processor",
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    ),
    "truncation": (
        "truncation",
        {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    ),
    "padding": (
        "padding",
        {
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
}


@pytest.mark.parametrize("field,value", USED.values(), ids=USED)
def test_what_is_used_here_is_read(changed, field, value):
    tokenizer = ChatTokenizer(changed(**{field: value}))
    assert 5 < len(tokenizer.encode(TALK).tokens) < 99


@pytest.mark.parametrize("regex", sorted(WORDS))
def test_words_are_cut_in_a_time_that_grows_with_the_text(changed, regex):
    """The worst runs: of spaces, letters, digits, signs, line ends."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    folder = changed(pre_tokenizer=sequence("pretokenizers", split({"Regex": regex}), byte_level))
    tokenizer = open_tokenizer(folder / "tokenizer.json", DataError)
    for run in (" ", "a", "1", "!", "\n", "'", " \n", "\u3000", "a'"):
        started = time.monotonic()
        tokenizer.encode(run * 50_000 + "x")
        assert time.monotonic() - started < 10, run


def test_published_tokenizers_are_read_as_the_library_reads_them(tmp_path):
    """What GPT-2, Llama 2, Llama 3 and T5 are made of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġa", "ab"])}
    gpt2 = tokenizers.Tokenizer(
        models.BPE(vocab, [("Ġ", "a"), ("a", "b")], continuing_subword_prefix="")
    )
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.post_processor, gpt2.decoder = (
        processors.ByteLevel(trim_offsets=False),
        decoders.ByteLevel(),
    )
    llama3 = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")], ignore_merges=True))
    regex = next(r for r in WORDS if r"\p{N}{1,3}" in r and "++" not in r)
    llama3.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama3.decoder = decoders.ByteLevel()
    llama3.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("ab $A", None, [("ab", vocab["ab"])]),
        ]
    )
    pieces = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "▁ab": 5}
    llama2 = tokenizers.Tokenizer(
        models.BPE(pieces, [("a", "b"), ("▁", "ab")], unk_token="<unk>", fuse_unk=True)
    )
    llama2.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    llama2.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    t5 = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("ab", -3.0)], 0))
    t5.normalizer = normalizers.Sequence([normalizers.NFKC()])
    t5.pre_tokenizer, t5.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t5.add_special_tokens(["<s>"])
    for theirs in (gpt2, llama3, llama2, t5):
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = open_tokenizer(tmp_path / "tokenizer.json", DataError)
        for text in ("ab  ab c<s> é 1234 'll\n\n x", " ab", ""):
            a, b = (t.encode(text, add_special_tokens=False) for t in (ours, theirs))
            assert (a.ids, a.offsets) == (b.ids, b.offsets)
            assert ours.decode(a.ids) == theirs.decode(a.ids)
    # Two keys of one name: what was checked is what is used.
    written = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text('{"decoder": {"type": "CTC"},' + written[1:])
    assert open_tokenizer(tmp_path / "tokenizer.json", DataError).decoder is not None


def test_a_panic_is_a_sentence(changed):
    """Of a kind that no list of components can know: Rust's panics are no `Exception`."""
    broken = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    broken.normalizer = normalizers.Precompiled(base64.b64decode(charsmap(2**31 - 1, 77)))
    with pytest.raises(BaseException) as panic:
        broken.encode("ab")
    assert not isinstance(panic.value, Exception), "it is one that panics"
    with (
        pytest.raises(DataError, match="a.json fails: the tokenizers library gave up"),
        calling_tokenizers("a.json fails", DataError),
    ):
        broken.encode("ab")
    tokenizer = ChatTokenizer(changed())
    tokenizer._tokenizer = broken
    with pytest.raises(DataError, match="theirs fails: the tokenizers library gave up"):
        tokenizer.encode_prompt(TALK[:1])
    with pytest.raises(KeyboardInterrupt), calling_tokenizers("a.json fails", DataError):
        raise KeyboardInterrupt


def test_a_charsmap_whose_places_lie_is_a_sentence(changed):
    """Its trie points beyond itself: the library stops when a text leads there."""
    map_ = charsmap(2**31 - 1, 77)
    folder = changed(normalizer=precompiled(map_))
    with pytest.raises(DataError, match="theirs fails: the tokenizers library gave up"):
        ChatTokenizer(folder).encode(TALK)


def test_a_tokenizer_without_tokens_for_an_answer(changed):
    folder = changed(model=bpe({"a": 0}), added_tokens=[], pre_tokenizer=None)
    with pytest.raises(DataError, match="has no tokens for an answer"):
        ChatTokenizer(folder).encode(TALK)


def test_a_file_that_is_too_large_or_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "MAX_BYTES", 2**20)
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**21)
    with pytest.raises(CheckpointError, match="a.json has 2 MiB, more than 1"):
        open_tokenizer(tmp_path / "a.json", CheckpointError)
    with pytest.raises(CheckpointError, match="b.json cannot be read: No such file"):
        open_tokenizer(tmp_path / "b.json", CheckpointError)
