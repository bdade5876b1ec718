"""Exported runs: what is written, and that reading them gives the run's own results."""

import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import write_run

from htfa_jax import HTFAInference, evaluate, export
from htfa_jax.checkpoints import weights
from htfa_jax.checkpoints.loading import load_run
from htfa_jax.checkpoints.runs import DEMO, MODEL, find_run
from htfa_jax.config import load_config, override
from htfa_jax.config.io import save_config
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import CheckpointError, ConfigError
from htfa_jax.evaluation import evaluator
from htfa_jax.evaluation.report import score_table as score_table
from htfa_jax.inference.export import export_run, stored_dtype
from htfa_jax.inference.model_card import model_card
from htfa_jax.inference.options import Decoding
from htfa_jax.models.factory import build_model

SCORES = {
    "samples": 3,
    "losses": {"loss": 1.23457},
    "alignment": {"boxes": 3},
    "fusion": {"alpha_mean": 0.625},
}


@pytest.fixture(scope="module")
def run(run_folder, tmp_path_factory):
    """A run that names places, evaluated at its own step and, on validation, at another."""
    root = tmp_path_factory.mktemp("machine")
    folder = shutil.copytree(run_folder, root / "run")
    config = override(
        load_config(folder),
        {
            "data.image_root": str(root),
            "data.tokenizer": str(root / "tokenizer"),
            "data.cache_dir": str(root / "cache"),
            "pretrained.siglip": str(root / "weights/siglip-x"),
        },
    )
    save_config(config, folder / "config.json")
    settings = folder / "tokenizer/tokenizer_config.json"
    weights.write_json(settings, {**json.loads(settings.read_text()), "name_or_path": str(root)})
    for split, step in (("test", 7), ("validation", 6)):
        (folder / "evaluation" / split).mkdir(parents=True)
        scores = {**SCORES, "step": step}
        weights.write_json(folder / "evaluation" / split / "metrics.json", scores)
        (folder / "evaluation" / split / "table.txt").write_text(score_table(scores) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The same, exported in bfloat16."""
    return export_run(run, tmp_path_factory.mktemp("out") / "held", license="mit")


@pytest.fixture()
def copy(exported, tmp_path):
    """An export that a test may damage."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def ask(dataset):
    """What an engine answers, paints and sees for five pairs."""
    records = RecordFile(dataset)

    def results(folder):
        engine = HTFAInference.from_pretrained(folder)
        assert engine.step == 7
        return [
            engine.infer(
                records[i].image_orig,
                records[i].image_recon,
                decoding=Decoding(max_new_tokens=8),
                return_intermediates=True,
            )
            for i in range(5)
        ]

    return results


@pytest.fixture(scope="module")
def expected(ask, run):
    return ask(run)


@pytest.mark.slow
def test_float32_gives_the_results_of_the_run_exactly(ask, expected, run, tmp_path):
    found = ask(export_run(run, tmp_path / "whole", dtype="float32"))
    for a, b in zip(found, expected, strict=True):
        assert (a.answer, a.confidence) == (b.answer, b.confidence)
        np.testing.assert_array_equal(a.completed, b.completed)
    assert len({b.answer for b in expected}) > 1


@pytest.mark.slow
def test_bfloat16_gives_them_within_rounding(ask, expected, exported):
    away, likely = [], []
    for a, b in zip(ask(exported), expected, strict=True):
        assert a.answer == b.answer and a.confidence == pytest.approx(b.confidence, rel=0.1)
        # Level 1 is not rounded.
        np.testing.assert_array_equal(a.intermediates.alpha_HW, b.intermediates.alpha_HW)
        codes_a, codes_b = (r.intermediates.code_probabilities_MC for r in (a, b))
        likely.append(np.abs(codes_a - codes_b).max())
        away.append(np.percentile(np.abs(np.int32(a.completed) - np.int32(b.completed)), 99))
    assert 0 < np.median(likely) < 0.01 and np.median(away) <= 8


def test_all_weights_and_nothing_else_are_stored(exported, run):
    shapes = build_model(load_config(run)).shapes
    with safe_open(exported / MODEL, framework="numpy") as file:
        kinds = {path: file.get_slice(path).get_dtype() for path in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"step": "7"}
    assert set(kinds) == set(shapes)
    whole = {path for path, kind in kinds.items() if kind == "F32"}
    assert whole == {p for p in shapes if p.startswith("level1.") or p == "vq.codebook"}
    assert set(kinds.values()) == {"F32", "BF16"}
    names = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert names == {
        "README.md",
        "config.json",
        MODEL,
        "evaluation/test/metrics.json",
        "evaluation/test/table.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }


def test_two_bytes_a_parameter(dataset, tmp_path):
    """At a size where the alpha map and the names of weights are not most of the file."""
    run = write_run(tmp_path / "run", dataset, decoder__mlp_dim=4096)
    out = export_run(run, tmp_path / "out")
    num = sum(np.prod(s.shape) for s in build_model(load_config(run)).shapes.values())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert num > 1e6 and 2 * num < size < 2 * num * 1.05


def test_what_the_run_keeps_in_16_bits_stays_so():
    kind = stored_dtype
    assert kind("siglip.head.kernel", np.dtype("float16"), "float32") == np.float16
    assert kind("siglip.head.kernel", np.dtype("float32"), "float32") == np.float32
    assert kind("vq.codebook", np.dtype("float32"), "bfloat16") == np.float32


def test_no_place_on_the_machine_is_written(exported, tmp_path_factory):
    root = str(tmp_path_factory.getbasetemp())
    for path in exported.rglob("*"):
        assert not path.is_file() or root.encode() not in path.read_bytes(), path
    config = load_config(exported)
    assert config.pretrained.siglip == "siglip-x" and config.data.train == "data.jsonl"
    assert config.data.image_root is None and config.data.tokenizer is None


def test_the_card_is_what_the_hub_reads(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "htfa_jax" and card.data.license == "mit"
    assert card.data.pipeline_tag == "visual-question-answering" and "htfa" in card.data.tags
    assert "3 scenes  loss 1.2346" in card.text and "`data.jsonl`" in card.text
    assert "siglip (`siglip-x`)" in card.text and "answers questions" in card.text
    assert "model_name" not in card.data.to_dict() and not card.data.eval_results


def test_the_hub_shows_the_scores_of_the_test_split(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    scores = json.loads((DEMO / "evaluation/test/metrics.json").read_text())
    weights.write_json(copy / "evaluation/test/metrics.json", {**scores, "step": 7})
    for place in (socket.socket, "connect"), (socket, "getaddrinfo"):
        monkeypatch.setattr(*place, None)  # nothing is asked of the hub
    card = ModelCard.load(export_run(copy, tmp_path / "name: of # it") / "README.md")
    assert card.data.model_name == "name: of # it"
    found = card.data.eval_results
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in found} == {
        ("data.jsonl", "data.jsonl", "test")
    }
    values = {r.metric_name: r.metric_value for r in found}
    assert values["accuracy of category"] == 0.97 and values["accuracy of color"] == 0.954
    assert values["PSNR of the completed image, dB"] == 21.74
    assert len(values) == len(scores["answers"]) + 1
    tasks = {r.metric_type: r.task_type for r in found}
    assert tasks == {"accuracy": "visual-question-answering", "psnr": "image-to-image"}
    (model,) = card.data.to_dict()["model-index"]
    assert [len(result["metrics"]) for result in model["results"]] == [len(values) - 1, 1]


@pytest.mark.parametrize(
    "odd",
    [
        "no",
        "1.0",
        "null",
        "a: b",
        "# x",
        "'\"",
        "x\n---\ntags: y",
        "{a}",
        "- a",
        "\u00e9\u2028\u00df",
        "!x &y *z",
    ],
)
def test_any_name_and_licence_come_back(odd, tmp_path):
    config = override(load_config("debug"), {"data.test": odd})
    scores = {"answers": {odd: {"all": {"accuracy": 0.5}}}}
    text = model_card(odd, config, 7, {}, "float32", scores, None, odd)
    (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == card.data.model_name == odd
    (found,) = card.data.eval_results
    assert found.dataset_type == found.dataset_name == odd
    assert found.metric_name == f"accuracy of {odd}" and found.metric_value == 0.5
    assert card.text.startswith(f"\n# {odd}\n")


def test_metrics_of_another_step_are_left_out(run, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        out = export_run(f"{run}/checkpoints/7", tmp_path / "out")
    assert "validation/metrics.json is left out: it is of step 6, not of 7" in caplog.text
    assert not (out / "evaluation/validation").exists()
    assert "Not stated" in (out / "README.md").read_text()


@pytest.mark.slow
def test_an_export_is_read_without_orbax(exported):
    program = (
        "import sys; from htfa_jax import HTFAInference;"
        f"assert HTFAInference.from_pretrained({str(exported)!r}).can_answer;"
        "print({name.split('.')[0] for name in sys.modules} & {'orbax', 'torch', 'transformers'})"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_hub_id_is_fetched_as_far_as_needed(exported, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    engine = HTFAInference.from_pretrained("someone/held", revision="v2")
    assert engine.step == 7
    names = [
        f"tokenizer/{n}" for n in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    ]
    # No pattern: `*` would match the names of folders, and bring along what is in them.
    assert asked == [("someone/held", "v2", ["config.json", MODEL, *names])]
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", "someone/held"])
    assert "nothing is written into the hub's copy" in capsys.readouterr().err
    shutil.copytree(exported, tmp_path / "someone" / "held")
    del asked[:]
    assert str(find_run("someone/held")[0]) == "someone/held" and not asked


def test_a_hub_that_does_not_give_an_export_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refusing(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    refusing(LocalEntryNotFoundError("no connection"))
    with pytest.raises(CheckpointError, match="someone/held .* the hub cannot be reached.*no conn"):
        find_run("someone/held")
    refusing(OSError("404 Client Error"))
    with pytest.raises(CheckpointError, match="someone/held is neither .* nor a repository.*404"):
        find_run("someone/held")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="someone/held is not a run.*htfa_jax.export"):
        find_run("someone/held")


def test_damaged_weights_are_named(copy):
    def shapes(config):
        return build_model(config).shapes

    whole, key = load_file(copy / MODEL), "level2.q_proj.kernel"
    assert key in whole
    save_file({k: v for k, v in whole.items() if k != key}, copy / MODEL, {"step": "7"})
    with pytest.raises(CheckpointError, match=rf"{MODEL} does not hold.*\n  missing: {key}"):
        load_run(copy, shapes)
    save_file({**whole, key: whole[key][:-1].copy()}, copy / MODEL, {"step": "7"})
    with pytest.raises(CheckpointError, match=rf"{key}: \(23, 24\) in .*\(24, 24\) in the model"):
        load_run(copy, shapes)
    save_file(whole, copy / MODEL)
    with pytest.raises(CheckpointError, match="does not say its step"):
        load_run(copy, shapes)
    (copy / MODEL).write_bytes((copy / MODEL).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{MODEL} cannot be read; is it complete"):
        load_run(copy, shapes)


def test_what_is_there_is_not_lost(run, exported, copy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(run), str(copy)])
    assert "exists: --overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="it is no exported run, and stays"):
        export_run(run, tmp_path / "mine", overwrite=True)
    with pytest.raises(ConfigError, match="no name of a licence"):
        export_run(run, tmp_path / "new", license="MIT\ntags: x")
    assert not (tmp_path / "new").exists()
    (copy / "old").write_text("")
    # An export can be exported again.
    export.main([str(exported), str(copy), "--overwrite", "--license", "mit"])
    assert not (copy / "old").exists()
    assert (copy / MODEL).read_bytes() == (exported / MODEL).read_bytes()
    assert (copy / "evaluation/test/metrics.json").is_file()


def test_an_export_is_evaluated_on_data_that_is_named(copy, dataset, monkeypatch, capsys):
    def look(self, params, records):
        assert set(params) == set(self.model.shapes)
        return evaluator.Report({**SCORES, "samples": len(records)}, [], [])

    monkeypatch.setattr(evaluator.Evaluator, "__call__", look)
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", str(copy)])
    assert "data.jsonl" in capsys.readouterr().err
    evaluate.main(["--checkpoint", str(copy), f"--config.data.test={dataset}"])
    scores = json.loads((copy / "evaluation/test/metrics.json").read_text())
    assert scores["step"] == 7 and scores["samples"] == len(RecordFile(dataset))
