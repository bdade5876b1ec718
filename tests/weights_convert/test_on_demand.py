"""Pretrained weights that a configuration names are converted into the cache, once."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import tiny

from htfa_jax.checkpoints import weights
from htfa_jax.config import override
from htfa_jax.errors import CheckpointError
from weights_convert import on_demand


def test_of_several_processes_one_converts(tmp_path, monkeypatch):
    """Each thread has a lock of its own, as processes do."""
    made, real = [], on_demand.write_folder

    def slowly(source, spec, folder, beside):
        made.append(folder)
        time.sleep(0.2)
        real(source, spec, folder, beside)

    monkeypatch.setattr(on_demand, "write_folder", slowly)
    config = tiny(data__cache_dir=str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(on_demand.converted, "siglip", "tiny", config) for _ in range(3)]
    (folder,) = {run.result() for run in runs}
    assert made == [folder] and folder.parent == tmp_path / "converted"
    assert weights.read_description(folder, "siglip")["family"] == "siglip"
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, folder.name + ".lock"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "converted").write_text("")
    with pytest.raises(
        CheckpointError, match=r"converted/siglip-.* cannot be written \(data.cache"
    ):
        on_demand.converted("siglip", "tiny", tiny(data__cache_dir=str(tmp_path)))


@pytest.mark.parametrize("component", ["siglip", "vq", "decoder", "htfa"])
def test_weights_may_be_gone_where_a_run_has_its_own(component, tmp_path):
    config = tiny(data__cache_dir=str(tmp_path / "cache"))
    config = override(config, {f"pretrained.{component}": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match="gone"):
        on_demand.with_weights(config, config)
    assert on_demand.with_weights(config, config, may_be_gone=True) == config
