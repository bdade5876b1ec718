"""Files that want to run something, or to lead elsewhere, are refused."""

import ast
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.manager import Checkpoints, load_frozen
from htfa_jax.config import load_config
from htfa_jax.data.tokenizer import ChatTokenizer
from htfa_jax.errors import CheckpointError, ConfigError, DataError
from weights_convert.source import Source

ROOT = Path(__file__).parents[2]


def calls(name):
    """Calls of that name in the packages, with where they are."""
    for path in (*ROOT.glob("htfa_jax/**/*.py"), *ROOT.glob("weights_convert/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield node, f"{path.relative_to(ROOT)}, line {node.lineno}"


def test_images_are_opened_with_a_list_of_formats():
    """Without one Pillow starts Ghostscript for an EPS of any name."""
    found = list(calls("Image.open"))
    assert found
    for node, where in found:
        assert "formats" in [keyword.arg for keyword in node.keywords], where


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Bytes of a pickle, and the file that is there once it was loaded."""
    path = tmp_path / "sprung"
    content = pickle.dumps(Payload(path))
    pickle.loads(content)
    assert path.exists()  # it works
    path.unlink()
    yield content, path
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_with_a_payload_is_no_source_of_weights(tmp_path, trap, name, zipped):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if zipped:  # as torch.save writes since 1.6
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", trap[0])
            archive.writestr("archive/version", "3\n")
            archive.writestr("../../slipped", "x")
    else:
        (folder / name).write_bytes(trap[0])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Source(folder)
    assert not list(tmp_path.glob("**/slipped"))


def test_a_pickle_is_no_weight_folder_and_no_run(tmp_path, trap):
    weights.save_component(tmp_path / "vq", "vq", tiny().vq, {"a": np.zeros(2)})
    (tmp_path / "vq" / weights.WEIGHTS).write_bytes(trap[0])
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.read_weights(tmp_path / "vq")
    (tmp_path / "config.json").write_bytes(trap[0])
    with pytest.raises(ConfigError, match="config.json: not UTF-8"):
        load_config(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).write_bytes(trap[0])
    with pytest.raises(DataError, match="tokenizer.json: not UTF-8"):
        ChatTokenizer(tmp_path / "tokenizer")


def test_a_pickle_is_no_checkpoint(tmp_path, trap, run_folder):
    (tmp_path / "config.json").write_bytes((run_folder / "config.json").read_bytes())
    items = tmp_path / "checkpoints/7"
    for name in ("params", "meta", "opt_state"):
        (items / name).mkdir(parents=True)
        for file in ("checkpoint", "_METADATA", "metadata", "manifest.ocdbt"):
            (items / name / file).write_bytes(trap[0])
    with pytest.raises(CheckpointError):
        load_run(tmp_path, lambda config: {})
    with pytest.raises(CheckpointError), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(7)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), 7, ["a"]):
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="which is not there|no weight_map"):
            Source(folder)


def test_frozen_weights_come_from_the_workdir_alone(tmp_path):
    weights.save_component(tmp_path / "elsewhere", "vq", tiny().vq, {"a": np.zeros(2)})
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), ".."):
        with pytest.raises(CheckpointError, match="expected vq-HASH"):
            load_frozen(tmp_path / "run", {"vq": name})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_a_chat_template_reaches_nothing(run_folder, tmp_path, template):
    for path in (run_folder / "tokenizer").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="the chat template of .* (fails|is wrong)"):
        ChatTokenizer(tmp_path)


def test_the_code_calls_nothing_that_runs_what_it_reads():
    """Of pickles, YAML, archives and evaluation there is `torch.load(weights_only=True)` alone.

    And `safe_pickle`, which is a machine of its own and has tests of its own.
    """
    forbidden = {
        "eval",
        "exec",
        "unpack_archive",
        "extractall",
        "unsafe_load",
        "full_load",
        "system",
    }
    modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib", "tarfile"}
    found = []
    files = [*ROOT.glob("htfa_jax/**/*.py"), *ROOT.glob("weights_convert/**/*.py")]
    assert len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                # `model.eval` of anything else takes no argument.
                if called.split(".")[-1] in forbidden and (node.args or "." not in called):
                    found.append(f"{where} {called}")
                if called.split(".")[0] in modules:
                    found.append(f"{where} {called}")
                if called == "torch.load" and given.get("weights_only") != "True":
                    found.append(f"{where} torch.load")
                if given.get("trust_remote_code", "False") != "False":
                    found.append(f"{where} trust_remote_code")
                if given.get("allow_pickle", "False") != "False" or given.get("shell") == "True":
                    found.append(f"{where} {given}")
    assert found == []
