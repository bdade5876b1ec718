import json
import pickle

import numpy as np
import pytest
from transformers import AutoTokenizer

from htfa_jax.data.records import Turn
from htfa_jax.data.tokenizer import ChatTokenizer, train_tokenizer
from htfa_jax.errors import DataError

TALK = (
    Turn("system", "Be brief."),
    Turn("user", "What's the object in the hand?"),
    Turn("assistant", "bottle"),
    Turn("user", "How much is hidden?"),
    Turn("assistant", "40 percent"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [text for turn in TALK for text in (turn.role, turn.text)] * 3
    train_tokenizer(texts, 330, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatTokenizer(folder)


def test_agrees_with_transformers(folder, tokenizer):
    """Rendering, tokens and prompts are those of AutoTokenizer and its chat template."""
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": t.role, "content": t.text} for t in TALK]
    assert tokenizer.render(TALK) == theirs.apply_chat_template(messages, tokenize=False)
    expected = theirs.apply_chat_template(messages, tokenize=True)
    ids = expected["input_ids"] if hasattr(expected, "keys") else expected
    np.testing.assert_array_equal(tokenizer.encode(TALK).tokens, ids)
    expected = theirs.apply_chat_template(messages[:2], tokenize=True, add_generation_prompt=True)
    ids = expected["input_ids"] if hasattr(expected, "keys") else expected
    np.testing.assert_array_equal(tokenizer.encode_prompt(TALK[:2]), ids)
    assert len(tokenizer) == len(theirs)


def test_only_what_the_assistant_says_is_learned(tokenizer):
    encoded = tokenizer.encode(TALK)
    said = [
        tokenizer._tokenizer.decode([t], skip_special_tokens=False)
        for t in encoded.tokens[encoded.learned]
    ]
    assert "".join(said) == "bottle<|im_end|>40 percent<|im_end|>"


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizer):
    """What follows a prompt in training is what is asked for after it."""
    prompt, whole = tokenizer.encode_prompt(TALK[:4]), tokenizer.encode(TALK)
    np.testing.assert_array_equal(whole.tokens[: len(prompt)], prompt)
    assert whole.learned[len(prompt)] and not whole.learned[len(prompt) - 1]


def test_decoding_ends_at_the_end_of_the_turn(tokenizer):
    encoded = tokenizer.encode(TALK)
    answer = encoded.tokens[np.flatnonzero(encoded.learned)[-1] - 2 :]
    ids = [int(t) for t in encoded.tokens[encoded.learned]]
    assert tokenizer.decode(ids) == "bottle"
    assert tokenizer.decode(answer) != ""
    assert tokenizer._tokenizer.token_to_id("<|im_end|>") in tokenizer.stop_ids
    assert tokenizer._tokenizer.token_to_id("</s>") in tokenizer.stop_ids


def test_any_text_survives(tokenizer):
    text = "naïve 你好 🙂\ttab  two spaces\nline"
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_role_names_are_one_token_after_training(tokenizer):
    assert tokenizer._tokenizer.encode("assistant").tokens == ["assistant"]


def test_it_can_be_sent_to_workers_and_saved(tokenizer, tmp_path):
    expected = tokenizer.encode(TALK).tokens
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(tokenizer)).encode(TALK).tokens, expected
    )
    tokenizer.save(tmp_path / "copy")
    np.testing.assert_array_equal(ChatTokenizer(tmp_path / "copy").encode(TALK).tokens, expected)


def test_another_template_works(folder, tmp_path):
    """ChatML without a beginning token, with a default system turn, in a file of its own."""
    ChatTokenizer(folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{%- if messages[0]['role'] != 'system' -%}<|im_start|>system\nhello<|im_end|>\n{% endif %}"
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = ChatTokenizer(tmp_path)
    encoded = tokenizer.encode(TALK[1:])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": t.role, "content": t.text} for t in TALK[1:]]
    assert tokenizer.render(TALK[1:]) == theirs.apply_chat_template(messages, tokenize=False)
    said = tokenizer._tokenizer.decode(encoded.tokens[encoded.learned], skip_special_tokens=False)
    assert said == "bottle<|im_end|>40 percent<|im_end|>"


def test_bad_folders_say_what_is_missing(folder, tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json in"):
        ChatTokenizer(tmp_path)
    ChatTokenizer(folder).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="has no chat template"):
        ChatTokenizer(tmp_path)


def test_a_template_that_hides_the_answer_is_refused(folder, tmp_path):
    ChatTokenizer(folder).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    )
    with pytest.raises(DataError, match="does not put an assistant turn right behind"):
        ChatTokenizer(tmp_path).encode(TALK)
