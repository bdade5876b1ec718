"""TFDS datasets, the embedded one among them, without TensorFlow."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from support import tiny

from htfa_jax.config import HeldObjectsConfig
from htfa_jax.data.held_objects.held_objects_dataset_builder import Builder, SceneConfig
from htfa_jax.data.pipeline import evaluation_batches
from htfa_jax.data.sources.tfds import TfdsRecords, plain
from htfa_jax.data.splits import open_named, open_split, open_tokenizer
from htfa_jax.errors import DataError

NUMS = {"num_train": 4, "num_validation": 2, "num_test": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of TFDS datasets, and of drawn scenes."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def built(home):
    """A small configuration of the builder, prepared, known by its name."""
    scenes = SceneConfig(
        name="tiny", image_size=48, scenes=HeldObjectsConfig(**NUMS), cache_dir=str(home / "cache")
    )
    Builder.BUILDER_CONFIGS.append(scenes)
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(home))
    patch.setattr(tfds.core.constants, "DATA_DIR", str(home))
    Builder.builder_configs["tiny"] = scenes
    yield Builder(config=scenes, data_dir=home)
    Builder.BUILDER_CONFIGS.remove(scenes)
    del Builder.builder_configs["tiny"]
    patch.undo()


@pytest.mark.slow
def test_the_embedded_dataset_is_the_same_through_tfds(built, home):
    held = {f"held_objects__{name}": num for name, num in NUMS.items()}
    config = tiny(data__cache_dir=str(home / "cache"), data__test="held_objects", **held)
    expected = open_split(config, "train")
    records = open_named(config, "tfds:held_objects/tiny", "train")
    assert len(records) == len(expected) == 4 and "held_objects/tiny:train" in repr(records)
    for i in range(4):
        a, b = records[i], expected[i]
        assert (a.id, a.turns, a.bbox_orig, a.bbox_recon) == (
            b.id, b.turns, b.bbox_orig, b.bbox_recon)  # fmt: skip
        assert a.image_recon.read_bytes() == b.image_recon.read_bytes()
        assert a.meta["color"] == b.meta["color"]
        assert a.meta["occlusion"] == pytest.approx(b.meta["occlusion"])
    tokenizer = open_tokenizer(config, home / "workdir", expected)
    found, wanted = (evaluation_batches(config, r, tokenizer) for r in (records, expected))
    for a, b in zip(found, wanted, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.batch, b.batch)


@pytest.mark.slow
def test_splits_by_name_and_by_default(built):
    for name, split, num in (
        ("held_objects/tiny", "validation", 2),
        ("held_objects/tiny:test", "train", 3),
        ("held_objects/tiny:train[1:3]", "test", 2),
        ("held_objects/tiny:1.0.0:test", "train", 3),
        ("held_objects/tiny:1.0.0", "test", 3),
    ):
        assert len(TfdsRecords(name, split, None, None)) == num


@pytest.mark.slow
def test_tfds_s_own_reader(built):
    source = tfds.data_source("held_objects/tiny", split="test")
    assert len(source) == 3 and source[0]["image_orig"].shape == (48, 48, 3)
    assert source[0]["object_mask"].shape == (48, 48, 1)


def test_its_sizes():
    assert list(Builder.builder_configs)[:3] == ["448px", "224px", "112px"]
    assert [c.image_size for c in Builder.BUILDER_CONFIGS[:3]] == [448, 224, 112]


def test_what_is_not_there(built):
    for name, reason in (
        ("no_such_dataset", "no_such_dataset"),
        ("held_objects/tiny:nowhere", "nowhere"),
    ):
        with pytest.raises(DataError, match=f"tfds:.* cannot be opened: .*{reason}"):
            TfdsRecords(name, "train", None, None)


def test_it_is_read_without_tensorflow(built):
    built.download_and_prepare()
    code = (
        "import sys, tensorflow_datasets; from htfa_jax.data.sources.tfds import TfdsRecords;"
        f"import htfa_jax.data.held_objects.held_objects_dataset_builder as b;"
        f"r = b.tfds.builder_from_directory({str(built.data_dir)!r}).as_data_source('train');"
        "r[1]; assert 'tensorflow' not in sys.modules; print(len(r))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "4"


class Other(tfds.core.GeneratorBasedBuilder):
    """Somebody's dataset: paths instead of images, JSON instead of turns, one record broken."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        names = ("id", "image", "conversations")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(dict.fromkeys(names, text))
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        turns = '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]'
        for i, text in enumerate((turns, turns[:-4])):
            yield i, {"id": f"r{i}", "image": f"a{i}.jpg", "conversations": text}


def test_other_features(built, tmp_path):
    records = TfdsRecords("other", "train", str(tmp_path), "{id}.png")
    found = {}
    for i in range(2):
        try:
            found[records[i].id] = records[i]
        except DataError as error:
            assert "tfds:other:train, record" in str(error) and "ends in the middle" in str(error)
    record = found.pop("r0")
    assert not found
    assert record.image_orig == tmp_path / "a0.jpg" and record.image_recon == tmp_path / "r0.png"
    assert [turn.text for turn in record.turns] == ["Hi", "Yes"]
    with pytest.raises(DataError, match="is a path, and a TFDS dataset has no folder"):
        for i in range(2):
            TfdsRecords("other", "train", None, None)[i]


def test_sequences_become_rows():
    columns = {"from": [b"human", b"gpt"], "value": [b"a", b"b"], "kind": [b"k", b""]}
    rows = [{"from": "human", "value": "a", "kind": "k"}, {"from": "gpt", "value": "b"}]
    assert plain(columns) == rows
    assert plain({"a": b"x", "b": np.float32(2)}) == {"a": "x", "b": 2.0}
    assert plain(np.array([1.0, 2.0], np.float32)) == [1.0, 2.0]


def test_where_the_builder_is():
    """`tfds build` looks for FOLDER/FOLDER_dataset_builder.py."""
    path = Path(sys.modules[Builder.__module__].__file__)
    assert path.name == f"{path.parent.name}_dataset_builder.py"
    assert Builder.name == path.parent.name == "held_objects"
