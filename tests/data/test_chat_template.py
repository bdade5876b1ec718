"""Chat templates of others are bounded in length, in what they write and in what they multiply."""

from pathlib import Path

import pytest

from htfa_jax.data import chat_template
from htfa_jax.data.chat_template import ChatTemplate, template_text
from htfa_jax.errors import DataError

TALK = [{"role": "user", "content": "a"}]


def rendered(text):
    return ChatTemplate(text, Path("theirs"), DataError).render(TALK, True, {"bos_token": "<s>"})


def test_it_has_the_names_that_transformers_gives():
    text = "{{ bos_token }}{% for m in messages %}{{ m.role * 2 }}{{ m | tojson }}{% endfor %}"
    assert rendered(text) == '<s>useruser{"role": "user", "content": "a"}'
    assert rendered("{{ 2 * 3 }}{{ 2 ** 4 }}{{ [1] * 2 }}{{ 1.5 * 2 }}") == "616[1, 1]3.0"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [messages] * 10**9 }}",
        "{{ 10 ** 99999 }}",
        "{{ (2 ** 900) * (2 ** 900) }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}",
        "{{ lipsum(10**6) }}",
        "x" * (chat_template.MAX_TEMPLATE + 1),
    ],
)
def test_much_out_of_little_is_refused(text):
    with pytest.raises(DataError, match="the chat template of theirs"):
        rendered(text)


def test_what_was_said_may_be_long():
    talk = [{"role": "user", "content": "a" * 300_000}]
    template = ChatTemplate("{{ messages[0].content }}", Path("theirs"), DataError)
    assert len(template.render(talk, False, {})) == 300_000


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="chat_template.jinja is not UTF-8"):
        template_text(tmp_path, {}, DataError)
    (tmp_path / "chat_template.jinja").unlink()
    for settings in ({}, {"chat_template": 5}, {"chat_template": [{"name": "default"}, 3]}):
        with pytest.raises(DataError, match="has no chat template"):
            template_text(tmp_path, settings, DataError)
