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
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in messages * 9999 if messages | map('upper') %}"
        "{% for j in messages * 9999 %}{% endfor %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop([1] * 10) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='ab') %}"
        "{% for i in range(99) %}{% set n.x = n.x.join([n.x] * 3) %}{% endfor %}",
        "{{ 'a' | center(10**9) }}",
        "{{ messages[0].content.ljust(10**9) }}",
        "{{ '%999999999d' % messages[0].content | length }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ messages | batch(10**9, 'a') | list }}",
        "x" * (chat_template.MAX_TEMPLATE + 1),
    ],
)
def test_much_out_of_little_is_refused(text):
    with pytest.raises(DataError, match="the chat template of theirs"):
        rendered(text)


def test_what_templates_do_all_the_time():
    text = (
        "{% set n = namespace(i=0) %}{% macro tag(x) %}<{{ x }}>{% endmacro %}"
        "{% for m in messages if m.role != 'tool' %}{% set n.i = n.i + 1 %}"
        "{{ tag(m.role ~ n.i) }}{{ loop.index0 % 2 }}{{ loop.last }}"
        "{{ [m.content, 'b'] | join(', ') }}{{ '-'.join(['c', 'd']) }}"
        "{{ m.content.replace('a', 'e') | replace('e', 'f') }}"
        "{{ messages | map(attribute='role') | join }}{% else %}none{% endfor %}"
        "{% for key, value in {'k': 1}.items() %}{{ key + '=' ~ value }}{% endfor %}"
    )
    assert rendered(text) == "<user1>0Truea, bc-dfuserk=1"


def test_a_budget_is_of_one_rendering():
    template = ChatTemplate(
        "{% for i in range(9000) %}{{ i }}{% endfor %}", Path("theirs"), DataError
    )
    texts = {template.render(TALK, True, {}) for _ in range(300)}
    assert len(texts) == 1


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
