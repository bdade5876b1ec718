import pytest

from htfa_jax.common.templates import check_template, fill
from htfa_jax.config import Config, override
from htfa_jax.data.obman import main as obman
from htfa_jax.data.records import parse_record
from htfa_jax.errors import ConfigError, DataError

WORDS = {"id": "a", "number": 7, "share": 0.5}
# What `str.format` does beside naming fields: reach, ask for memory, convert.
MORE = [
    "{id.__class__}",
    "{id.__class__.__mro__}",
    "{id[0]}",
    "{number:100000000000}",
    "{number:3000000000}",
    "{number:>9}",
    "{number:{id}}",
    "{id!r}",
    "{id!s:>9}",
    "{}",
    "{0}",
    "{ id }",
    "{id",
    "id}",
]


@pytest.mark.parametrize("template", MORE)
def test_a_template_names_fields_and_nothing_more(template):
    template = f"x/{template}.png"
    with pytest.raises(ValueError):
        check_template(template)
    with pytest.raises(ValueError):
        fill(template, WORDS)
    with pytest.raises(ConfigError, match=r"(?s)data.recon_template=.* must name fields"):
        override(Config(), {"data.recon_template": template})
    raw = {"id": "a", "image_orig": "a.png"}
    with pytest.raises(DataError, match="data.recon_template=.* is no template"):
        parse_record(raw, "here", lambda name: name, template, with_turns=False)


def test_fields_are_filled_in():
    for template, text in (
        ("{id}/{number}_{id}.png", "a/7_a.png"),
        ("{share}{{x}}", "0.5{x}"),
    ):
        check_template(template)
        assert fill(template, WORDS) == text
    with pytest.raises(KeyError, match="name"):
        fill("{name}", WORDS)
    with pytest.raises(ValueError, match="names no field"):
        check_template("recon.png")


def test_a_command_has_no_other_templates(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        obman([str(tmp_path), str(tmp_path), "--views", "v", "--recon_template", "{id:9999999999}"])
    assert stopped.value.code == 2 and "--recon_template" in capsys.readouterr().err
