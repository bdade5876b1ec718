import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

from htfa_jax.data.records import Turn
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import CheckpointError
from weights_convert.tokenizer import convert_tokenizer

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "A hand holds a bottle; <40> percent of it is hidden.",
    "def area(x):\n    return x * 2\n",
    "for i in range(10):\n\tprint(i, [i])",
    "你好，世界。手里拿着一个瓶子。",
    "  indented text   with runs of   spaces",
    "aaaa aaa aa abab hahahaha",
    "naïve café 🙂",
    "user assistant system",
)
TEXTS = (
    *CORPUS,
    "",
    " ",
    "   ",
    " leading",
    "trailing  ",
    "a  b   c    d",
    "\ttabs\t\tand\n\n\nlines\n \n",
    "🙂🙃 👨‍👩‍👧 flags 🇩🇪",
    "龘靐 rare 漢字 with words",
    "class Hand:\n    def hold(self, *args):\n        if self.x != 3:\n            return {'a': 1}",
    "ＦＵＬＬ ｗｉｄｔｈ ①② ﬁ ™",
    "a literal ▁ and ▁▁two",
    "not a byte: <0x0A>",
    "aaaaaaa hahahahah",
    "x\u00a0y\u3000z",
)
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
INTERNLM2 = EXACT | {"add_dummy_prefix": False}
TALK = (Turn("user", "What is it?"), Turn("assistant", "A bottle."))


def train(**options):
    """A small SentencePiece model, as bytes."""
    defaults = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "character_coverage": 0.99,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10), model_writer=model, **defaults | options
    )
    return model.getvalue()


def write(folder, **files):
    """Files of a checkpoint by the stem of their name, values of .json as objects."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"model": "tokenizer.model", "fast": "tokenizer.json", "jinja": "chat_template.jinja"}
    paths = {}
    for stem, content in files.items():
        path = folder / names.get(stem, f"{stem}.json")
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)
        paths[path.name] = path
    return paths


def converted(tmp_path, **files):
    """The fast tokenizer that a checkpoint's files become, and its folder."""
    convert_tokenizer(write(tmp_path / "source", **files), tmp_path / "out")
    return tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")), tmp_path / "out"


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def internlm2(**changes):
    """A checkpoint like InternLM2's: pieces with new names, and one token behind the last."""
    model = train(**INTERNLM2, user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"])
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    places = {
        sp["[UNUSED_TOKEN_1]"]: "<|im_end|>",
        sp["[UNUSED_TOKEN_2]"]: "<|im_start|>",
        len(sp): "<img>",
    }
    config = {
        "added_tokens_decoder": {
            str(i): {"content": content, "special": True, "normalized": True}
            for i, content in places.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "additional_special_tokens": None,
        "chat_template": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "tokenizer_class": "InternLM2Tokenizer",
    }
    return {"model": model, "tokenizer_config": config | changes}, sp, places


@pytest.mark.parametrize(
    "options",
    [
        INTERNLM2,
        EXACT,
        {},
        {"remove_extra_whitespaces": False},
        EXACT | {"byte_fallback": False},
        INTERNLM2 | {"user_defined_symbols": ["hand", "[i]", "▁▁", "▁▁▁"]},
        EXACT | {"model_type": "unigram"},
        {"model_type": "unigram"},
    ],
    ids=str,
)
def test_tokens_and_text_are_sentencepieces(tmp_path, options):
    """Same ids and same decoded text, whatever the model's settings."""
    model = train(**options)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer, _ = converted(tmp_path, model=model)
    assert tokenizer.get_vocab_size() == len(sp)
    for text in TEXTS:
        expected = sp.encode(text)
        assert ids(tokenizer, text) == expected, text
        known = [i for i in expected if i != sp.unk_id()]  # which sp writes as ⁇
        assert tokenizer.decode(known) == sp.decode(known), text


def test_a_dummy_prefix_goes_behind_added_tokens_as_transformers_puts_it(tmp_path):
    """Llama's `legacy` treats every part between added tokens as a text of its own."""
    model = train(**EXACT, user_defined_symbols=["[i]"])
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "<s>hand[i] holds</s>"
    tokenizer, _ = converted(tmp_path, model=model)
    expected = [sp["<s>"], *sp.encode("hand"), sp["[i]"], *sp.encode(" holds"), sp["</s>"]]
    assert ids(tokenizer, text) == expected

    tokenizer, _ = converted(tmp_path, model=model, tokenizer_config={"legacy": False})
    assert ids(tokenizer, "hand") == sp.encode("hand")
    assert ids(tokenizer, "<s> hand") == [sp["<s>"], *sp.encode("hand")]
    assert "".join(map(sp.id_to_piece, ids(tokenizer, "<s>hand"))) == "<s>hand"


def test_special_tokens_keep_their_ids(tmp_path):
    """Pieces with a new name, tokens behind the last piece, from both files that list them."""
    files, sp, places = internlm2()
    added = {"<box>": len(sp) + 1, "plain": len(sp) + 2}
    names = {"additional_special_tokens": ["<box>"]}
    tokenizer, folder = converted(tmp_path, **files, added_tokens=added, special_tokens_map=names)
    assert len(ChatTokenizer(folder)) == len(sp) + 3
    known = {"<unk>": 0, "<s>": 1, "</s>": 2, **{v: k for k, v in places.items()}, **added}
    for token, i in known.items():
        assert ids(tokenizer, token) == [i]
        expected = [*sp.encode("a hand"), i, *sp.encode(" holds")]
        assert ids(tokenizer, f"a hand{token} holds") == expected
        said = tokenizer.decode(expected, skip_special_tokens=True)
        assert said == ("a handplain holds" if token == "plain" else "a hand holds")
    assert tokenizer.token_to_id("[UNUSED_TOKEN_1]") is None


def test_a_conversation_is_the_checkpoints_template_in_its_tokens(tmp_path):
    files, sp, places = internlm2()
    _, folder = converted(tmp_path, **files)
    chat = ChatTokenizer(folder)
    text = (
        "<s><|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA bottle.<|im_end|>\n"
    )
    assert chat.render(TALK) == text
    start, end = (
        next(i for i, t in places.items() if t == f"<|im_{x}|>") for x in ("start", "end")
    )
    expected = [1, start, *sp.encode("user\nWhat is it?"), end, *sp.encode("\n")]
    expected += [start, *sp.encode("assistant\nA bottle."), end, *sp.encode("\n")]
    encoded = chat.encode(TALK)
    np.testing.assert_array_equal(encoded.tokens, expected)
    assert chat.decode(encoded.tokens[encoded.learned]) == "A bottle."
    assert chat.stop_ids == {2, end}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == files["tokenizer_config"]["chat_template"]
    # No downloaded class is left for transformers to look for.
    assert "auto_map" not in settings and "InternLM2" not in settings["tokenizer_class"]


def test_a_template_file_wins_and_without_one_internlm2s_is_used(tmp_path, caplog):
    files, _, _ = internlm2()
    jinja = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    _, folder = converted(tmp_path, **files, jinja=jinja)
    assert ChatTokenizer(folder).render(TALK) == "[What is it?][A bottle.]"
    assert not caplog.records

    files, _, _ = internlm2(chat_template=None)
    _, folder = converted(tmp_path / "other", **files)
    assert (
        ChatTokenizer(folder).render(TALK).startswith("<s><|im_start|>user\nWhat is it?<|im_end|>")
    )
    assert "no chat template: InternLM2's is used" in caplog.text
    assert "are not tokens" not in caplog.text

    _, folder = converted(tmp_path / "bare", model=files["model"])
    assert "<|im_start|> and <|im_end|> are not tokens" in caplog.text
    assert ChatTokenizer(folder).render(TALK).startswith("<s>")
    assert ChatTokenizer(folder).pad_id == 2


def test_a_fast_tokenizer_is_kept_as_it_is(tmp_path):
    """Byte for byte, even beside a SentencePiece model; only its settings are completed."""
    train_tokenizer(CORPUS, 330, tmp_path / "fast")
    fast = (tmp_path / "fast/tokenizer.json").read_bytes() + b"\n"
    settings = json.loads((tmp_path / "fast/tokenizer_config.json").read_text())
    _, folder = converted(
        tmp_path, fast=fast, model=b"damaged", tokenizer_config=settings | {"auto_map": {}}
    )
    assert (folder / "tokenizer.json").read_bytes() == fast
    assert json.loads((folder / "tokenizer_config.json").read_text()) == settings
    np.testing.assert_array_equal(
        ChatTokenizer(folder).encode(TALK).tokens,
        ChatTokenizer(tmp_path / "fast").encode(TALK).tokens,
    )


def message(number, content):
    return bytes([number << 3 | 2, len(content)]) + content


def forged(text=b"a", score=b"\0\0\x80\xbf", trainer=b"\x18\x02", normalizer=b""):
    """A SentencePiece model of three pieces, by hand."""
    pieces = b""
    for piece, number, kind in ((b"<unk>", bytes(4), 2), (b"</s>", bytes(4), 3), (text, score, 1)):
        size = len(piece)
        head = bytes([10]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7]))
        body = head + piece + b"\x15" + number + bytes([0x18, kind])
        size = len(body)
        pieces += bytes([10, size & 127 | 128, size >> 7]) + body
    return pieces + message(2, trainer) + message(3, normalizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": b""}, "has the piece '': pieces have 1 to 1000 characters"),
        ({"text": b"a" * 1001}, "has the piece 'a+': pieces have 1 to 1000 characters"),
        ({"score": b"\0\0\xc0\x7f"}, "has the piece 'a': .* scores up to"),  # not a number
        ({"trainer": b"\x18\x02\xca\x02\x01x"}, "settings of another type than a number"),
        ({"normalizer": b"\x10\x05"}, "a normalization that is no bytes"),
        ({"normalizer": message(2, b"\xff")}, "no tokenizer can be made of|cannot be used"),
    ],
)
def test_a_forged_model_is_refused(tmp_path, changes, message):
    converted(tmp_path / "good", model=forged(), jinja="{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, model=forged(**changes), jinja="{{ messages[0].content }}")


def test_a_model_cut_anywhere_is_refused(tmp_path):
    model = train(**EXACT)
    for size in range(0, len(model) - 5, 61):
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a whole"):
            converted(tmp_path, model=model[:size])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": b"version https://git-lfs.github.com/spec/v1\n"},
            r"tokenizer\.model is not a whole",
        ),
        ({"fast": b'{"version": "1.0"'}, r"tokenizer\.json: not valid JSON"),
        ({"tokenizer_config": b'{"bos_token": "<s'}, r"tokenizer_config\.json: not valid JSON"),
        ({"tokenizer_config": [1]}, r"tokenizer_config\.json: expected an object"),
        ({"added_tokens": b"\xff"}, r"added_tokens\.json: not UTF-8"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "must be an object of tokens by id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "has 'x', which is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"²": {}}}}, "has '²', which is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": "x"}}}, "has '3', which is no id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {}}}}, "added token 3 must have"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"3": {"content": "a", "lstrip": 2}}}},
            "special of the added token 3 must be true or false",
        ),
        ({"added_tokens": {"<box>": "9"}}, r"added_tokens.json: '<box>' must have a number"),
        ({"added_tokens": {"<box>": -1}}, "added token -1 must have an id"),
        ({"added_tokens": {"<box>": 9999}}, r"'<box>' .*has id 9999, but \d+ is missing"),
        ({"added_tokens": {"hand": 300}}, "'hand' .*is token 3 and 300"),
        ({"special_tokens_map": {"eos_token": "<end>"}}, "eos_token is '<end>', which is not"),
        ({"tokenizer_config": {"bos_token": {"content": "<bos>"}}}, "bos_token is '<bos>'"),
        ({"jinja": "{% for %}"}, "the tokenizer cannot be used"),
        ({"jinja": "{{ raise_exception('never') }}"}, "the tokenizer cannot be used: .*never"),
    ],
    ids=str,
)
def test_damaged_files_are_named(tmp_path, changes, message):
    model = train(**INTERNLM2, user_defined_symbols=["hand"])
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, **{"model": model} | changes)


def test_a_fast_tokenizer_without_the_added_tokens_is_refused(tmp_path):
    train_tokenizer(CORPUS, 330, tmp_path / "fast")
    fast = (tmp_path / "fast/tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"'<img>' should be token 3, .*json it is None"):
        converted(tmp_path, fast=fast, added_tokens={"<img>": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char", "byte_fallback": False}, "of type char; bpe and unigram"),
        ({"model_type": "word", "byte_fallback": False}, "of type word; bpe and unigram"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix, which is not"),
    ],
    ids=str,
)
def test_other_kinds_of_models_are_refused(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, model=train(**options))


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        converted(tmp_path, tokenizer_config={})
