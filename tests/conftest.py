import gc
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation, of programs that then run for milliseconds, here and in
# the processes that tests start; none of them has to be optimized.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's older emitters, in one piece, take a third of the time; later releases have them no more.
if version("jaxlib").startswith("0.10."):
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

import jax
import pytest
from support import random_weights, tiny, write_dataset, write_run

from htfa_jax.checkpoints.weights import save_component
from htfa_jax.models.factory import build_model
from htfa_jax.training import vq_stage

# Tracing makes millions of objects that live on; looking through them costs a tenth of the time.
gc.set_threshold(200_000, 50, 100)
# A shape that broadcasts by accident is a bug that a test should see.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request):
    """Programs are compiled once for all test processes, what they start, and later sessions.

    `pytest --cache-clear` forgets them.
    """
    folder = request.config.cache.mkdir("compiled")
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Path of a tiny JSON-lines dataset of 7 records."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), 7)


@pytest.fixture(scope="session")
def vq_folder(tmp_path_factory):
    """A weight folder of a tokenizer with random weights."""
    config = tiny()
    structure = vq_stage.build_vq(config)
    folder = tmp_path_factory.mktemp("vq") / "weights"
    save_component(folder, "vq", config.vq, random_weights(structure))
    return folder


@pytest.fixture(scope="session")
def run_folder(dataset, tmp_path_factory):
    """The workdir of a run with random weights."""
    return write_run(tmp_path_factory.mktemp("run"), dataset)


@pytest.fixture(scope="session")
def model():
    """(config, structure, weights) of the tiny model."""
    config = tiny()
    structure = build_model(config)
    return config, structure, random_weights(structure)
