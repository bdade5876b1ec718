import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from htfa_jax.data.records import Turn
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.tokenizer import ChatTokenizer, encode_record, train_tokenizer
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


def test_what_is_too_long_ends_behind_its_last_whole_answer(tokenizer):
    """At every length: never half an answer, never a question without one."""
    whole = tokenizer.encode(TALK)
    texts = {0: ""}
    for limit in range(len(whole.tokens) + 1):
        encoded = whole.within(limit)
        assert len(encoded.tokens) <= limit
        text = tokenizer._tokenizer.decode(encoded.tokens, skip_special_tokens=False)
        if text not in texts.values():
            texts[limit] = text
    first, second = whole.ends
    assert list(texts) == [0, first, second, len(whole.tokens)]
    assert texts[first] == tokenizer.render(TALK[:3]).removesuffix("\n")
    assert texts[second] == tokenizer.render(TALK).removesuffix("\n")
    assert texts[len(whole.tokens)] == tokenizer.render(TALK)
    np.testing.assert_array_equal(whole.within(first).learned, whole.learned[:first])
    assert whole.learned[first - 1] and whole.within(first).ends == (first,)


def test_turns_of_every_kind_are_read(tokenizer):
    """System turns within, two questions in a row, a question at the end that nobody answers."""
    talk = (
        *TALK,
        Turn("system", "Now in full sentences."),
        Turn("user", "Look again."),
        Turn("user", "What is it?"),
        Turn("assistant", "The object is bottle."),
        Turn("user", "Sure?"),
    )
    encoded = tokenizer.encode(talk)
    said = tokenizer._tokenizer.decode(encoded.tokens[encoded.learned], skip_special_tokens=False)
    assert said == "bottle<|im_end|>40 percent<|im_end|>The object is bottle.<|im_end|>"
    assert len(encoded.ends) == 3
    cut = encoded.within(len(encoded.tokens) - 1)
    assert tokenizer._tokenizer.decode(cut.tokens, skip_special_tokens=False).endswith(
        "The object is bottle.<|im_end|>"
    )


@pytest.mark.parametrize("text", ["word " * 40_000, "a" * 200_000, "🙂" * 50_000])
def test_an_answer_of_200000_characters_is_refused_with_its_length(tokenizer, text, dataset):
    record = replace(RecordFile(dataset)[1], turns=(TALK[1], Turn("assistant", text.strip())))
    reason = r"\(id r1\): no answer is left within data.max_text_length=500 tokens: .*ends at token"
    with pytest.raises(DataError, match=reason) as caught:
        encode_record(record, tokenizer, 500)
    assert caught.value.kind == "too long a text"
