"""The reader of JSON: every text gives a value or one kind of error, whatever it holds."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import DAMAGED_JSON

from htfa_jax.common.json_files import NESTING, json_lines, parse_json, read_json, read_json_lines
from htfa_jax.errors import CheckpointError, ConfigError, DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("content", DAMAGED_JSON.values(), ids=DAMAGED_JSON)
def test_whatever_is_wrong_is_an_error_of_one_class_that_names_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: \w.{{10}}"):
        read_json(path, CheckpointError)


@given(st.binary())
@example(b"9" * 5000)
@example(b"[" * 100_000)
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes_give_a_value_or_that_error(content):
    for allow_nan in (False, True):
        try:
            assert isinstance(
                parse_json(content, "here", DataError, object, allow_nan=allow_nan), object
            )
        except DataError as error:
            assert str(error).startswith("here: ")


@given(st.text(alphabet='[]{}",:\\u0129.eE+-dDnaftruslINity \n\ufeff', max_size=60))
def test_any_text_like_json_gives_a_value_or_that_error(text):
    try:
        assert isinstance(parse_json(text, "here", ConfigError, list), list)
    except ConfigError as error:
        assert str(error).startswith("here: ")


@pytest.mark.slow
@given(VALUES)
def test_a_value_comes_back(value):
    text = json.dumps(value)
    if "NaN" not in text and "Infinity" not in text:
        assert parse_json(text, "here", DataError, object) == value
    again = parse_json(text.encode(), "here", DataError, object, allow_nan=True)
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[1]", "expected an object, found a list: is it the right file?"),
        ("null", "expected an object, found null"),
        ("1e3", "expected an object, found a number"),
        ('{"a": NaN}', "holds NaN, which is no number here"),
        ('{"a": -Infinity}', "holds -Infinity, which is no number"),
        ('{"a": 1e999}', "holds 1e999, which is no number"),
        ('{"a": ' + "1" * 5000 + "}", "a number in it has more than 4300 digits"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 but UTF-16: save it as UTF-8"),
        (b'{"a": "\xe9"}', "not UTF-8: byte 0xe9 at position 7; save it as UTF-8"),
        ('{"a": 1,}', "a comma is left over before } at character 8"),
        ('{\n "a": 1\n "b": 2\n}', "not valid JSON: .* at line 3, character 1"),
        ('{"a": [1, 2', "it ends in the middle"),
    ],
)
def test_messages_say_what_is_wrong(text, said):
    with pytest.raises(DataError, match=f"^x.json, line 3: .*{said}"):
        parse_json(text, "x.json, line 3", DataError)


def test_brackets_inside_each_other_are_counted():
    """Of what passes, `repr` and `json.dumps` cannot run out of stack."""
    for depth, opened, closed in ((NESTING, "[", "]"), (NESTING, '{"a":', "}")):
        assert parse_json(opened * depth + "0" + closed * depth, "x", DataError, object)
        with pytest.raises(DataError, match="too many brackets inside each other"):
            parse_json(opened * (depth + 1) + "0" + closed * (depth + 1), "x", DataError, object)
    many = [[]] * 5 * NESTING
    assert parse_json(json.dumps(many), "x", DataError, list) == many


def test_numbers_that_are_not_finite_are_read_where_python_wrote_them():
    found = parse_json('{"a": NaN, "b": -Infinity}', "x", DataError, allow_nan=True)
    assert math.isnan(found["a"]) and found["b"] == -math.inf


def test_a_file_that_is_not_there_is_the_same_error(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: "):
            read_json(path, ConfigError)
        with pytest.raises(DataError, match=f"{path} cannot be read: "):
            list(read_json_lines(path, DataError))


def test_lines_are_numbered_and_blank_ones_do_not_count(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": "x\xe2\x80\xa8y"}\r\n  \n{"a": 2}')
    assert [number for number, _ in json_lines(path, DataError)] == [2, 4]
    assert list(read_json_lines(path, DataError)) == [{"a": "x\u2028y"}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n\n[2]\n{"a": 3}\n')
    with pytest.raises(DataError, match=f"{path}, line 3: expected an object, found a list"):
        list(read_json_lines(path, DataError))
    path.write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(DataError, match=f"{path} is UTF-16: save it as UTF-8"):
        list(read_json_lines(path, DataError))


def test_half_a_last_line_is_none(tmp_path):
    path = tmp_path / "a.jsonl"
    for half in (b'{"a": ', b'{"a": "\xe2\x80', b"\0\0\0", b"["):
        path.write_bytes(b'{"a": 1}\n' + half)
        assert list(read_json_lines(path, DataError)) == [{"a": 1}]
        path.write_bytes(b'{"a": 1}\n' + half + b"\n")
        with pytest.raises(DataError, match="line 2: "):
            list(read_json_lines(path, DataError))
