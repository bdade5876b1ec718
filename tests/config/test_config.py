import dataclasses
import json
from pathlib import Path

import pytest
from support import tiny

from htfa_jax.checkpoints import runs
from htfa_jax.config import Config, checks, get, leaves
from htfa_jax.config.io import (
    ConfigFlags,
    _taken_out,
    from_dict,
    load_config,
    override,
    parse_args,
    presets_folder,
    save_config,
    source_name,
    to_dict,
)
from htfa_jax.data.held_objects.questions import QUESTIONS
from htfa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Args:
    """A command."""

    config: ConfigFlags
    dry_run: bool = False
    workdir: str | None = None


def test_json_and_back(tmp_path):
    config = tiny(data__text_buckets=(30, 70), optim__learning_rate_factors=((r"a\..*", 2.0),))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert load_config(tmp_path) == config


def test_every_preset_loads_by_name_and_by_file():
    names = [path.stem for path in presets_folder().glob("*.py")]
    assert {"debug", "standard"} <= set(names)
    for name in names:
        assert load_config(name) == load_config(presets_folder() / f"{name}.py")
    assert load_config("standard") == Config()


def test_flags_override_files():
    args = parse_args(
        Args,
        [
            "--config",
            "debug",
            "--workdir",
            "x",
            "--config.train.batch_size=3",
            "--config.level1.learnable=False",
            "--config.optim.learning_rate",
            "2e-5",
            "--config.train.max_steps",
            "7",
            "--config.data.text_buckets",
            "96",
            "200",
            "--config.data.validation",
            "None",
        ],
    )
    assert args.workdir == "x" and args.config.train.batch_size == 3
    assert args.config.level1.learnable is False and args.config.optim.learning_rate == 2e-5
    assert args.config.train.max_steps == 7 and args.config.data.text_buckets == (96, 200)
    assert args.config.data.validation is None
    rest = override(
        load_config("debug"),
        {
            "train.batch_size": 3,
            "level1.learnable": False,
            "optim.learning_rate": 2e-5,
            "train.max_steps": 7,
            "data.text_buckets": (96, 200),
            "data.validation": None,
        },
    )
    assert args.config == rest and not args.dry_run
    assert parse_args(Args, ["--config", "debug", "--dry_run"]).dry_run


@pytest.mark.parametrize(
    "flag,shown",
    [
        ("--config.train.learning_rte=1e-4", "config.optim.learning_rate"),
        ("--config.train.batch_size=2.5", "2.5"),
        ("--config.level1.alpha=mask", "map"),
        ("--workdri=x", "workdir"),
    ],
)
def test_wrong_flags_fail_with_the_nearest_name(flag, shown, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(Args, ["--config", "debug", flag])
    assert ended.value.code == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"train.learning_rate": 1.0}, "unknown configuration field train.learning_rate"),
        ({"optim.learning_rte": 1.0}, "did you mean learning_rate?"),
        ({"trian.epochs": 1}, "did you mean train?"),
        ({"train": 3}, "train is a group of fields"),
        ({"train.batch_size": "4"}, "train.batch_size='4' is of type str"),
        ({"train.batch_size": True}, "train.batch_size=True is of type bool"),
        ({"level2.alignment": "pixel"}, "must be one of features, pixels, none"),
        ({"data.image_mean": (0.5, 0.5)}, "data.image_mean"),
        ({"train.max_steps": 1.5}, "train.max_steps=1.5"),
    ],
)
def test_wrong_names_and_types_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(), changes)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_size": 450}, "image_size=450 must be a multiple of siglip.patch_size=14"),
        ({"siglip.num_heads": 7}, "siglip.embed_dim=1152 must be a multiple of siglip.num_heads"),
        ({"level2.num_heads": 7}, "must be a multiple of level2.num_heads=7"),
        ({"decoder.num_kv_heads": 3}, "decoder.num_heads=16 must be a multiple of"),
        ({"vq.channel_multipliers": (1,) * 8}, "image_size=448 must be a multiple of the VQ"),
        ({"level1.init_alpha": 1.0}, "level1.init_alpha=1.0 must be inside"),
        ({"level1.num_scales": 2}, "works with level1.alpha=map"),
        ({"loss.text_weight": 0.0, "loss.code_weight": 0.0}, "nothing to train"),
        ({"level3.generation": False}, "set loss.code_weight=0"),
        (
            {"fusion": "tokens", "data.cache_features": True, "pretrained.siglip": "x"},
            "fusion=tokens has no Level 2",
        ),
        ({"data.text_buckets": (512, 128)}, "must be rising lengths"),
        ({"data.text_buckets": (128,)}, "must reach data.max_text_length=2048"),
        ({"optim.learning_rate": float("nan")}, "optim.learning_rate=nan must be finite"),
        (
            {"pretrained.run": "a", "pretrained.vq": "b"},
            "pretrained.run=a gives all weights: leave pretrained.vq unset",
        ),
        ({"image_size": -5}, "image_size=-5 must not be negative"),
        ({"train.batch_size": 0}, "train.batch_size=0 must be above 0"),
        ({"level2.dropout": 1.0}, r"level2.dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(), changes)


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        override(Config(), {"train.batch_size": 0, "level1.init_alpha": 2.0})
    assert "train.batch_size" in str(error.value) and "level1.init_alpha" in str(error.value)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.batch_size = 3


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="packaged presets: .*debug, .*standard"):
        load_config("debgu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not valid JSON: it ends in the middle"):
        load_config(tmp_path / "config.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, not a configuration"):
        load_config(tmp_path / "list.json")
    (tmp_path / "c.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"is a .py file with get_config\(\), or a .json"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="has no get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "c.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(ConfigError, match="returned int, not a Config"):
        load_config(tmp_path / "c.py")


def test_names_of_runs(monkeypatch):
    assert source_name(["--config", "configs/debug.py"]) == "debug"
    assert source_name(["--config=runs/old_run/config.json"]) == "old_run"
    assert source_name([]) == "standard"
    times = iter([("20261130", "161850"), ("20261130", "161851")])
    monkeypatch.setattr(runs.time, "strftime", lambda form: "_".join(next(times)))
    assert runs.new_workdir("debug") == Path("runs/debug_20261130_161850")
    assert runs.new_workdir("debug") == Path("runs/debug_20261130_161851")


def test_the_configuration_is_taken_out_of_any_command_line():
    others = ["pos", "--dry_run", "-x", "--other-flag=c d", "--configuration", "b", "--help", ""]
    for at in range(6):
        for given in (["--config", "None"], ["--config=None"], ["--config=a", "--config", "None"]):
            argv = [*others[:at], *given, *others[at:]]
            assert _taken_out(argv, "config") == ("None", others)
    more = ["--config.train.max_steps", "7", "--config.train.batch_size=4"]
    assert _taken_out(more, "config") == (None, more)
    with pytest.raises(SystemExit) as ended:
        _taken_out(["--config"], "config")
    assert ended.value.code == 2


def test_shell_completion_is_of_the_whole_command(capsys):
    with pytest.raises(SystemExit):
        parse_args(Args, ["--tyro-print-completion", "bash"])
    assert "--workdir" in capsys.readouterr().out


def test_leaves_are_all_fields():
    names = dict(leaves(Config()))
    assert names["train.batch_size"] == get(Config(), "train.batch_size") == 2
    assert not any(dataclasses.is_dataclass(v) for v in names.values())


@pytest.mark.parametrize(
    "value,said",
    [("1e30", "optim.learning_rate=1e+30 is too large"), (str(10**40), "100000... (41 digits)")],
)
def test_a_number_that_is_too_large_is_shown(value, said):
    name = "optim.learning_rate" if "e" in value else "seed"
    with pytest.raises(ConfigError) as error:
        override(Config(), {name: float(value) if "e" in value else int(value)})
    assert said in str(error.value)


def test_the_best_metric_is_looked_up_before_anything_is_drawn():
    drawn = {"data.validation": "held_objects"}
    for name in (*checks.METRICS, *(f"accuracy/{kind}" for kind in checks.KINDS)):
        override(Config(), drawn | {"train.best_metric": name})
    override(Config(), {"data.validation": "mine.jsonl", "train.best_metric": "accuracy/mine"})
    for name, near in (("los", "loss"), ("accuracy/colour", "accuracy/color"), ("psnr/al", "psnr")):
        with pytest.raises(ConfigError, match=f"did you mean {near}"):
            override(Config(), drawn | {"train.best_metric": name})
    assert set(checks.KINDS) == {*QUESTIONS, "joint"}


def test_a_printed_configuration_can_be_read():
    config = tiny(train__epochs=7)
    lines = str(config).splitlines()
    assert len(lines) == len(list(leaves(config))) and max(map(len, lines)) < 200
    assert "train.epochs = 7" in lines and "optim.name = 'adamw'" in lines
    assert f"{config}" == str(config)
    assert override(Config(), dict(leaves(config))) == config
