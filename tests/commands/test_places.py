"""A run's config.json is a stranger's: no place that it names is read, written, or run from."""

import json
import shutil
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny

from htfa_jax import evaluate, export, infer, reproduce, train
from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.manager import load_frozen
from htfa_jax.checkpoints.runs import make_workdir, run_config
from htfa_jax.common.cli import use_compilation_cache
from htfa_jax.config import Config, leaves, load_config, override
from htfa_jax.config.io import save_config, to_dict
from htfa_jax.data.held_objects import contact_sheet
from htfa_jax.data.sources import array_records
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.data.splits import open_split
from htfa_jax.demo import __main__ as demo
from htfa_jax.demo.options import DemoArgs
from htfa_jax.errors import CheckpointError, DataError
from htfa_jax.evaluation import report
from htfa_jax.evaluation.evaluator import Report
from htfa_jax.evaluation.report_html import write_report
from htfa_jax.inference.export import export_run
from htfa_jax.inference.inputs import read_jobs
from htfa_jax.models.factory import build_model

# Fields of text that name no place: words, patterns, and names inside a dataset.
NO_PLACES = {
    "data.recon_template",
    "data.default_query",
    "optim.learning_rate_factors",
    "optim.no_decay",
    "train.best_metric",
}
SCORES = {
    "samples": 1,
    "losses": {"loss": 1.0},
    "alignment": {"boxes": 1},
    "fusion": {},
}


class Begun(Exception):
    """A command would begin its work."""


def begin(*_, **__):
    raise Begun


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own; JAX has no folder for compiled programs yet."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def theirs(run_folder, tmp_path):
    """A stranger's run whose configuration names places everywhere."""
    folder = shutil.copytree(run_folder, tmp_path / "theirs")
    url = "reference://x.jsonl::file://refs.json"
    places = {f"data.{split}": url for split in ("train", "validation", "test")}
    places |= {f"pretrained.{n}": f"{folder}/{n}" for n in ("siglip", "vq", "decoder", "htfa")}
    places |= {"data.cache_dir": f"{folder}/cache", "data.image_root": f"{folder}/images"}
    places |= {"data.tokenizer": f"{folder}/other", "data.sources": ((url, 1.0),)}
    save_config(override(load_config(folder), places), folder / "config.json")
    return folder


# What may be taken from a run.


def test_no_place_of_a_run_is_taken(theirs):
    text = json.dumps(to_dict(run_config(theirs)))
    assert str(theirs) not in text and "://" not in text
    config, *_ = load_run(theirs, lambda c: build_model(c).shapes)
    assert config == run_config(theirs)
    for split in ("train", "validation", "test"):
        with pytest.raises(DataError, match=f"data.{split} is not set"):
            open_split(config, split)
    # What decides sizes and what is frozen stays.
    assert config.is_frozen("siglip") and config.decoder == load_config(theirs).decoder


def test_every_field_of_text_is_known_to_be_a_place_or_none(theirs):
    """A new field has to be put into `config.places`, or on the list above."""
    taken = dict(leaves(run_config(theirs)))
    for name, value in leaves(load_config(theirs)):
        section, field = name.split(".") if "." in name else (None, name)
        cls = Config if section is None else type(getattr(Config(), section))
        hint = typing.get_type_hints(cls)[field]
        holds_text = hint is str or str in typing.get_args(hint) or "tuple[str" in str(hint)
        if holds_text and name not in NO_PLACES:
            assert taken[name] != value or value is None, f"{name} is taken from a run"


def test_a_run_is_never_taken_for_a_python_file(run_folder, tmp_path, monkeypatch):
    """`:tiny` behind a name means another configuration, but a folder may be called so."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('RAN').touch()\n")
    folder = shutil.copytree(run_folder, tmp_path / "evil.py:tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer, "predict", begin)
    with pytest.raises(Begun):
        infer.main(["--checkpoint", folder.name, "--output_dir", "o", "--image_orig", "a.png"])
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", folder.name])
    load_run(folder, lambda c: build_model(c).shapes)
    export_run(folder, tmp_path / "out")
    assert not (tmp_path / "RAN").exists()


def test_the_embedded_dataset_of_a_run_stays(tmp_path, home):
    """It is drawn, in this account's own cache: a run cannot say where."""
    held = {"data.train": "held_objects", "data.test": "held_objects"}
    config = override(tiny(), held | {"data.cache_dir": str(tmp_path / "theirs")})
    save_config(config, tmp_path / "config.json")
    found = run_config(tmp_path)
    assert found.data.train == found.data.test == "held_objects"
    assert found.data.cache_dir == "~/.cache/htfa_jax"
    assert len(open_split(found, "test")) == 3
    assert not (tmp_path / "theirs").exists() and (home / ".cache/htfa_jax").is_dir()


def test_evaluate_reads_the_data_of_its_command_line(
    theirs, run_folder, dataset, tmp_path, monkeypatch, capsys
):
    read = []

    def look(self, params, records):
        read.append(records)
        return Report({**SCORES, "samples": len(records)}, [], [])

    monkeypatch.setattr("htfa_jax.evaluation.evaluator.Evaluator.__call__", look)
    monkeypatch.chdir(tmp_path)
    for run, split, named in (
        (theirs, "test", "reference://"),
        (theirs, "train", "reference://"),
        (run_folder, "test", str(dataset)),
        (run_folder, "validation", "held_objects"),
    ):
        if named == "held_objects":
            continue
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--checkpoint", str(run), "--split", split])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and not read
        assert f"--config.data.{split}=FILE" in said and named in said
    evaluate.main(["--checkpoint", str(theirs), f"--config.data.test={dataset}"])
    assert len(read) == 1 and len(read[0]) == len(RecordFile(dataset))


# Compiled programs: JAX runs what it finds in their folder.


def commands(theirs, tmp_path, monkeypatch):
    """What to call of each command, up to its work."""
    monkeypatch.setattr(infer, "predict", begin)
    monkeypatch.setattr("htfa_jax.evaluation.evaluator.evaluate_run", begin)
    monkeypatch.setattr("htfa_jax.training.trainer.train", begin)
    monkeypatch.setattr("htfa_jax.inference.engine.HTFAInference.__init__", begin)
    monkeypatch.setattr("htfa_jax.training.reproduction.Layout", begin)
    monkeypatch.setattr(
        "htfa_jax.training.reproduction.load_dump", lambda folder: ({}, {"processes": 1})
    )
    run, out = str(theirs), str(tmp_path / "out")
    none = [f"--config.pretrained.{n}=None" for n in ("siglip", "vq", "decoder", "htfa")]
    return {
        "infer": lambda: infer.main(
            ["--checkpoint", run, "--output_dir", out, "--image_orig", "a.png"]
        ),
        "evaluate": lambda: evaluate.main(["--checkpoint", run, "--config.data.test=a.jsonl"]),
        "demo": lambda: demo.open_page(DemoArgs(), theirs),
        "train": lambda: train.main(["--config", f"{run}/config.json", "--workdir", out, *none]),
        "reproduce": lambda: reproduce.main([f"{run}/nonfinite/step_1"]),
    }


@pytest.mark.parametrize("name", ["infer", "evaluate", "demo", "train", "reproduce"])
def test_compiled_programs_come_from_this_account_alone(theirs, tmp_path, home, monkeypatch, name):
    call = commands(theirs, tmp_path, monkeypatch)[name]
    with pytest.raises(Begun):
        call()
    folder = home / ".cache/htfa_jax/compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not (theirs / "cache").exists()


def test_another_folder_is_named_by_the_environment_alone(home, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # as JAX reads it
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert not (home / ".cache").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777, 0o720])
def test_a_folder_that_others_can_write_to_is_not_used(home, caplog, mode):
    folder = home / ".cache/htfa_jax/compiled"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert f"others can write to {folder}" in caplog.text and "delete it" in caplog.text


def test_a_folder_of_somebody_else_is_not_used(home, caplog, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "belongs to another account" in caplog.text


def test_a_link_and_a_file_are_no_folder_of_compiled_programs(home, tmp_path, caplog):
    parent = home / ".cache/htfa_jax"
    parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for make in (
        lambda path: path.symlink_to(tmp_path / "elsewhere"),
        lambda path: path.write_text(""),
    ):
        make(parent / "compiled")
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        assert "compiled programs are not kept" in caplog.text
        (parent / "compiled").unlink()
        caplog.clear()


def test_a_folder_that_others_could_only_read_is_closed(home):
    folder = home / ".cache/htfa_jax/compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


# Names inside folders.


def test_records_to_infer_stay_in_their_folder(dataset, tmp_path):
    (tmp_path / "secret").mkdir()
    secret = shutil.copy(dataset.parent / "orig0.png", tmp_path / "secret/a.png")
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    names = {
        str(secret): "is an absolute path: set --image_root",
        "../secret/a.png": "leads out of",
        "link/a.png": "a link that leads out of .*--image_root",
        "a\0.png": "zero byte",
        "file:///etc/a.png": "is an absolute path",
    }
    path = folder / "pairs.jsonl"
    fields = ("image_orig", "image_recon", "object_mask", "occluder_mask")
    for field in fields:
        rows = [{"id": n, "image_orig": "a.png", field: n} for n in names]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for job, said in zip(read_jobs(path, ("Q?",)), names.values(), strict=True):
            with pytest.raises(DataError, match=f"{field}=.*{said}"):
                raise job.record
    path.write_text(json.dumps({"image_orig": str(secret)}))
    (job,) = read_jobs(path, ("Q?",), tmp_path / "secret")
    assert job.record.image_orig == Path(secret)


def test_a_root_of_images_goes_with_a_file_of_pairs(theirs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        infer.main(["--checkpoint", str(theirs), "--output_dir", str(tmp_path), "--image_orig",
                    "a.png", "--image_root", "."])  # fmt: skip
    assert "--image_root is of the images that --input names" in capsys.readouterr().err


@pytest.mark.parametrize("absolute", [True, False])
def test_a_report_shows_images_of_its_folder_alone(tmp_path, absolute):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "secret.png")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    name = str(tmp_path / "secret.png") if absolute else "../secret.png"
    for figures in ({"images": name}, {"images": "link.png"}, {"other": "a.png"}):
        entry = {
            "id": "a",
            "answers": [],
            "figures": figures,
            "alignment": "",
            "reconstruction": "",
        }
        (folder / "predictions.jsonl").write_text(json.dumps(entry) + "\n")
        with pytest.raises(DataError, match="predictions.jsonl, id a: "):
            write_report(folder, "title")
    assert not (folder / "report.html").exists()


def test_a_contact_sheet_shows_images_of_its_folder_alone(dataset, tmp_path):
    good = json.loads(dataset.read_text().splitlines()[0])
    good["meta"] |= {"color": "red", "category": "cup"}
    folder = shutil.copytree(dataset.parent, tmp_path / "set")
    path = folder / "sheet.jsonl"
    path.write_text(json.dumps(good))
    assert contact_sheet(path, tmp_path / "sheet.png").is_file()
    for change, said in (
        ({"image_recon": str(dataset.parent / "recon0.png")}, "is an absolute path"),
        ({"object_mask": "../mask.png"}, "leads out of"),
        ({"image_target": None}, "image_target is missing"),
        ({"bbox_orig": None}, "bbox_orig or bbox_recon is missing"),
        ({"meta": {}}, "meta.occlusion is missing"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=f"sheet.jsonl, record 0.*{said}"):
            contact_sheet(path, tmp_path / "sheet.png")


def test_an_evaluation_is_written_into_the_run_alone(run_folder, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run_folder, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "profile").write_text("mine")
    (run / "evaluation").symlink_to(elsewhere)
    monkeypatch.setattr(
        "htfa_jax.evaluation.evaluator.evaluate_run", lambda *_: (Report(SCORES, [], []), run)
    )
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(run), "--config.data.test=a"])
    assert stopped.value.code == 2 and "give --output_dir" in capsys.readouterr().err
    assert len(list(elsewhere.iterdir())) == 1
    (run / "evaluation").unlink()
    (run / "evaluation/test").mkdir(parents=True)
    for name in ("metrics.json", "table.txt", "predictions.jsonl"):
        (run / "evaluation/test" / name).symlink_to(elsewhere / "profile")
    report.write(Report(SCORES, [], []), run / "evaluation/test")
    assert (elsewhere / "profile").read_text() == "mine"
    assert json.loads((run / "evaluation/test/metrics.json").read_text()) == SCORES


def test_an_export_takes_nothing_from_outside_of_the_run(run_folder, tmp_path, capsys):
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE")
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "tokenizer/chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match="chat_template.jinja is a link that leads out of"):
        export_run(run, tmp_path / "out")
    with pytest.raises(SystemExit):
        export.main([str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_train_through_links(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "alias").symlink_to(run)
    assert make_workdir(tmp_path / "alias").is_dir()
    (tmp_path / "elsewhere").mkdir()
    (run / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="logs is a link that leads out of .*run"):
        make_workdir(run)


def test_frozen_weights_are_in_the_run_whatever_a_component_is_called(tmp_path):
    arrays = {"a": np.zeros(2, np.float32)}
    digits = weights.digest(arrays)[:12]
    weights.save_component(tmp_path / f"elsewhere/vq-{digits}", "vq", tiny().vq, arrays)
    (tmp_path / "run/frozen").mkdir(parents=True)
    name = f"../../elsewhere/vq-{digits}"
    with pytest.raises(CheckpointError, match="leads out of"):
        load_frozen(tmp_path / "run", {"../../elsewhere/vq": name})
    (tmp_path / f"run/frozen/vq-{digits}").symlink_to(tmp_path / f"elsewhere/vq-{digits}")
    with pytest.raises(CheckpointError, match="a link that leads out of"):
        load_frozen(tmp_path / "run", {"vq": f"vq-{digits}"})


@pytest.mark.parametrize("name", ["../r.array_record", "/etc/passwd", "a//b", ""])
def test_a_manifest_names_shards_beside_it(tmp_path, name):
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": name, "bytes": 5}]}))
    with pytest.raises(DataError, match="manifest.json is no manifest of shards"):
        array_records.find_shards(str(folder))
