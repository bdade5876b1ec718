"""A run goes on in another place: what it was made from is told by content, not by path."""

import json
import shutil

import jax
import pytest
from support import random_weights, tiny

from htfa_jax import train
from htfa_jax.checkpoints.integrity import steps
from htfa_jax.checkpoints.weights import save_component
from htfa_jax.config import load_config, override
from htfa_jax.config.io import save_config
from htfa_jax.models.factory import build_model
from htfa_jax.training.origins import ORIGINS


def write_siglip(folder, config, scale=1.0):
    """A weight folder of random weights."""
    arrays = {
        path.removeprefix("siglip."): scale * value
        for path, value in random_weights(build_model(config)).items()
        if path.startswith("siglip.")
    }
    save_component(folder, "siglip", config.siglip, jax.device_get(arrays))
    return folder


@pytest.fixture(scope="module")
def first(dataset, tmp_path_factory):
    """A run of one step on the machine where it began."""
    machine = tmp_path_factory.mktemp("machine")
    config = tiny(
        data__train=str(dataset), data__validation=None, data__test=None,
        data__cache_dir=str(machine / "cache"), level3__generation=False, loss__code_weight=0.0,
        level2__alignment="none", train__max_steps=1, optim__schedule="constant",
    )  # fmt: skip
    folder = write_siglip(machine / "siglip-0123456789abcdef", config)
    save_config(config, machine / "config.json")
    train.main(
        ["--config", str(machine / "config.json"), "--workdir", str(machine / "run"),
         f"--config.pretrained.siglip={folder}"]
    )  # fmt: skip
    return machine


@pytest.fixture
def moved(first, tmp_path):
    """All of it on another machine, where nothing is at its old place."""
    machine = shutil.copytree(first, tmp_path / "other")
    for path in (machine / "config.json", machine / "run/config.json"):
        config = load_config(path)
        if config.pretrained.siglip is not None:
            gone = {"pretrained.siglip": "/home/of/another/siglip-0123456789abcdef"}
            save_config(override(config, gone), path)
    return machine


def go_on(machine, config, *more):
    train.main(
        ["--config", str(config), "--workdir", str(machine / "run"),
         "--config.train.max_steps=2", *more]
    )  # fmt: skip


@pytest.mark.slow
def test_it_goes_on_although_its_weights_are_gone(moved):
    go_on(moved, moved / "run/config.json")
    assert 2 in steps(moved / "run")


@pytest.mark.slow
def test_the_same_weights_at_another_place_are_the_same(moved):
    place = moved / "siglip-0123456789abcdef"
    shutil.move(place, moved / "mine")
    go_on(moved, moved / "config.json", f"--config.pretrained.siglip={moved / 'mine'}")
    assert 2 in steps(moved / "run")
    assert load_config(moved / "run").pretrained.siglip == str(moved / "mine")


@pytest.mark.slow
def test_other_weights_are_refused_whatever_they_are_called(moved, capsys):
    config = load_config(moved / "run")
    place = write_siglip(moved / "x/siglip-0123456789abcdef", config, scale=2.0)
    with pytest.raises(SystemExit) as stopped:
        go_on(moved, moved / "config.json", f"--config.pretrained.siglip={place}")
    assert stopped.value.code == 2
    assert f"pretrained.siglip was /home/of/another/siglip-0123456789abcdef and is now {place}" in (
        capsys.readouterr().err
    )
    assert steps(moved / "run") == [1]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_knows_converted_weights_by_their_name(moved, capsys):
    known = moved / "run" / ORIGINS
    assert set(json.loads(known.read_text())) == {"pretrained.siglip"}
    known.unlink()
    with pytest.raises(SystemExit):
        shutil.copytree(moved / "siglip-0123456789abcdef", moved / "mine")
        go_on(moved, moved / "config.json", f"--config.pretrained.siglip={moved / 'mine'}")
    assert "use another --workdir" in capsys.readouterr().err.lower()
    place = moved / "siglip-0123456789abcdef"
    go_on(moved, moved / "config.json", f"--config.pretrained.siglip={place}")
    assert 2 in steps(moved / "run")


@pytest.mark.slow
def test_places_come_from_the_command_and_none_from_the_run(moved, dataset, tmp_path, capsys):
    """The data of the command is read, whatever the run's own configuration says."""
    path = moved / "run/config.json"
    save_config(override(load_config(path), {"data.train": "reference://x::data:,"}), path)
    here = shutil.copytree(dataset.parent, tmp_path / "here") / dataset.name
    place = moved / "siglip-0123456789abcdef"
    go_on(
        moved, moved / "config.json", f"--config.pretrained.siglip={place}",
        f"--config.data.train={here}",
    )  # fmt: skip
    assert 2 in steps(moved / "run") and load_config(path).data.train == str(here)
