"""The parts and the demo model that come with the package: converted once, and of use."""

import json
import shutil

import pytest

from htfa_jax import infer
from htfa_jax.checkpoints import weights
from htfa_jax.config import Config, load_config, override
from htfa_jax.errors import CheckpointError
from htfa_jax.models.factory import build_model
from htfa_jax.training.pretrained import load_pretrained
from weights_convert import on_demand
from weights_convert.on_demand import with_weights


@pytest.fixture()
def debug(tmp_path):
    return override(load_config("debug"), {"data.cache_dir": str(tmp_path / "cache")})


def test_parts_in_the_form_of_pytorch_are_converted_once(debug, tmp_path):
    found = with_weights(debug, debug)
    folders = [getattr(found.pretrained, part) for part in weights.FAMILIES]
    made = sorted(p for p in (tmp_path / "cache" / "converted").iterdir() if p.is_dir())
    assert sorted(folders) == [str(path) for path in made] and len(made) == 3
    assert all((path / "conversion.json").is_file() for path in made)
    times = [(path / weights.WEIGHTS).stat().st_mtime_ns for path in made]
    assert with_weights(debug, debug) == found == with_weights(found, found)
    assert [(path / weights.WEIGHTS).stat().st_mtime_ns for path in made] == times


def test_a_package_installed_elsewhere_has_the_same_parts(debug, tmp_path, monkeypatch):
    here = with_weights(debug, debug).pretrained
    shutil.copytree(
        on_demand.tiny("siglip").parent, tmp_path / "again" / "tiny", copy_function=shutil.copy
    )
    monkeypatch.setattr(on_demand.htfa_jax, "__file__", str(tmp_path / "again" / "__init__.py"))
    assert with_weights(debug, debug).pretrained == here


@pytest.mark.parametrize("left_out", ["loss.text_weight", "loss.code_weight"])
def test_without_a_head_its_weights_are_left_out(debug, left_out):
    config = override(debug, {left_out: 0.0})
    model = build_model(config)
    loaded = load_pretrained(with_weights(config, config), model)
    wanted = {p for p in model.shapes if p.split(".")[0] in ("siglip", "vq", "decoder")}
    assert set(loaded) == wanted
    gone = {"loss.text_weight": "decoder.embed.embedding", "loss.code_weight": "vq.decoder."}
    assert not [path for path in loaded if path.startswith(gone[left_out])]


def test_the_preset_has_the_sizes_of_its_parts(debug):
    found = with_weights(debug, debug)
    for part in weights.FAMILIES:
        assert getattr(found, part) == getattr(debug, part)
    # Read from the folders where a configuration does not say.
    bare = {f"pretrained.{part}": "tiny" for part in weights.FAMILIES}
    places = {"data.cache_dir": debug.data.cache_dir, "image_size": 112}
    config = override(Config(), bare | places | {"level2.num_heads": 4})
    assert with_weights(config, config).siglip == debug.siglip


def test_other_images_need_other_positions(debug):
    larger = with_weights(override(debug, {"image_size": 224}), debug)
    assert larger.pretrained.siglip != with_weights(debug, debug).pretrained.siglip
    assert larger.pretrained.vq == with_weights(debug, debug).pretrained.vq


def test_a_name_that_is_nothing(debug, tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder .*nowhere"):
        wrong = override(debug, {"pretrained.vq": str(tmp_path / "nowhere")})
        with_weights(wrong, debug)
    assert not list((tmp_path / "cache").glob("converted/vq-*"))


@pytest.mark.slow
def test_the_demo_answers_and_completes(tmp_path, capsys, monkeypatch):
    """Of its four example scenes it names and paints most right."""
    monkeypatch.chdir(tmp_path)
    infer.main(["--demo"])
    rows = [json.loads(line) for line in (tmp_path / "demo" / "predictions.jsonl").open()]
    named = [row["answers"][0]["answer"] == row["id"].replace("_", " ") for row in rows]
    assert len(rows) == 4 and sum(named) >= 3
    assert all((tmp_path / "demo" / row["completed"]).is_file() for row in rows)
    assert rows[0]["answers"][0]["answer"] in capsys.readouterr().out


def test_the_demo_brings_its_own_model(capsys):
    for arguments, said in (
        (["--demo", "--checkpoint", "x"], "leave --checkpoint out"),
        (["--query", "x"], "--checkpoint is missing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            infer.main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
