"""Configurations from files and command lines, changed by name, and back to files.

A configuration file is a Python file with `get_config() -> Config` (see `configs/`), or the
`config.json` that a run wrote; `:tiny` behind its name gives the same at test size. `override`
changes fields by dotted name; `parse_args` reads `--config FILE` and `--config.train.batch_size=4`
from a command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.machinery
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from htfa_jax.common.cli import parse
from htfa_jax.common.files import write_whole
from htfa_jax.common.json_files import read_json
from htfa_jax.config.config import Config
from htfa_jax.config.fields import leaves
from htfa_jax.config.renamed import FIELDS, METRICS, current, current_flags, names_of
from htfa_jax.errors import ConfigError

# All different where they may be, and no head as wide as another model's.
SIZES = {
    "image_size": 48,
    "siglip.patch_size": 12,
    "siglip.embed_dim": 24,
    "siglip.num_layers": 2,
    "siglip.num_heads": 3,
    "siglip.mlp_dim": 36,
    "vq.stem": 8,
    "vq.base_channels": 12,
    "vq.channel_multipliers": (1,),
    "vq.num_res_blocks": 1,
    "vq.z_channels": 20,
    "vq.codebook_size": 22,
    "vq.codebook_dim": 6,
    "decoder.vocab_size": 390,
    "decoder.embed_dim": 40,
    "decoder.num_layers": 2,
    "decoder.num_heads": 4,
    "decoder.num_kv_heads": 2,
    "decoder.mlp_dim": 56,
    "level1.head_channels": 5,
    "level2.num_heads": 4,
    "level3.adapter_mlp_dim": 28,
    "loss.text_chunk": 32,
    "data.max_text_length": 70,
    "data.text_buckets": (70,),
    "data.tokenizer_vocab_size": 390,
    "held_objects.num_train": 8,
    "held_objects.num_validation": 3,
    "held_objects.num_test": 3,
    "train.max_steps": 4,
    "eval.batch_size": 3,
    "eval.max_new_tokens": 5,
    "vq_train.num_steps": 3,
    "vq_train.batch_size": 4,
}

# Behind a configuration's name: the same at test size.
TINY = ":tiny"
# The type of a command's `config` field: its fields take `=True` and `=False`, while a switch of
# the command itself is given by its name alone.
ConfigFlags = Annotated[Config, tyro.conf.FlagConversionOff]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns `config` with fields changed, as in `{"train.batch_size": 4}`.

    Raises ConfigError for an unknown name (with the nearest one), a wrong type, or a result
    that does not validate.
    """
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{name}: {part} is given as a value too")
        node[last] = value
    return _build(Config, tree, config)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as written to config.json."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The reverse of `to_dict`; fields that are not named keep their defaults."""
    return _build(Config, values, Config())


def _build(cls: type, values: Mapping[str, Any], base: Any, prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    changes = {}
    for given, value in values.items():
        name = current(FIELDS, f"{prefix}{given}").removeprefix(prefix)
        if name not in hints:
            raise ConfigError(f"unknown configuration field {prefix}{name}{_nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a group of fields, not a value: {value!r}")
            changes[name] = _build(hints[name], value, getattr(base, name), f"{prefix}{name}.")
        else:
            changes[name] = _typed(value, hints[name], prefix + name)
            if prefix + name == "train.best_metric":
                changes[name] = current(METRICS, changes[name], "metric")
    return dataclasses.replace(base, **changes)


def _nearest(name: str, valid: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(valid)}"


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` if it has the type `hint` (whole numbers are floats too, lists are tuples)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(str, args))}")
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_typed(v, k, name) for v, k in zip(value, kinds, strict=True))
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{name}={value!r} is of type {type(value).__name__}, expected {hint}")


def load_config(source: str | Path) -> Config:
    """Reads a configuration.

    Args:
      source: a Python file with `get_config()`, a `config.json` as a run writes it, a folder
        that holds one, or the name of a packaged preset (`debug`); with `:tiny` behind it, see
        `config_tiny`.
    """
    if str(source).endswith(TINY):
        return tiny(load_config(str(source).removesuffix(TINY)))
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.suffix and not path.exists():
        path = presets_folder() / f"{source}.py"
    if not path.is_file():
        raise ConfigError(
            f"no configuration at {source}; packaged presets: {', '.join(preset_names())}"
        )
    if path.suffix == ".json":
        # A number that is not finite is refused by its name, with all other problems.
        values = read_json(path, ConfigError, object, allow_nan=True)
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not a configuration")
        try:
            return from_dict(values)
        except ConfigError as error:
            raise ConfigError(
                f"{path}: {error}\nWas it written by another version? Delete from the file what "
                "this one does not know; fields that are not there get their defaults"
            ) from error
    if path.suffix != ".py":
        raise ConfigError(f"{path}: a configuration is a .py file with get_config(), or a .json")
    loader = importlib.machinery.SourceFileLoader(f"htfa_config_{path.stem}", str(path))
    module = types.ModuleType(loader.name)
    module.__file__ = str(path)
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config()")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a Config")
    return config


def fields_without_value(path: Path) -> list[str]:
    """Names of the fields that a `config.json` does not set, as an older version wrote it."""
    values = read_json(path, ConfigError, allow_nan=True)
    missing = []
    for name, _ in leaves(Config()):
        if not any(_has(values, known) for known in names_of(FIELDS, name)):
            missing.append(name)
    return missing


def _has(values: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def presets_folder() -> Path:
    """Where the packaged configurations are: inside the package, or the repository's own."""
    package = Path(__file__).parent.parent
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(path.stem for path in presets_folder().glob("*.py"))


def preset_changes(name: str) -> dict[str, Any]:
    """What a preset changes of the defaults, by dotted name."""
    defaults = dict(leaves(Config()))
    return {k: v for k, v in leaves(load_config(name)) if v != defaults[k]}


def save_config(config: Config, path: Path) -> None:
    """Writes `config` so that `load_config` reads the same; whole or not at all."""
    write_whole(path, json.dumps(to_dict(config), indent=2) + "\n", durable=True)


def source_name(argv: Sequence[str]) -> str:
    """A short name for the `--config` of a command line, for the folder of its run."""
    given, _ = _taken_out(argv, "config")
    source = "standard" if given is None else given
    path = Path(source.removesuffix(TINY))
    name = path.parent.name if path.name == "config.json" else path.stem
    return f"{name}_tiny" if source.endswith(TINY) else name


def _taken_out(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of `--NAME` in a command line (None without one), and the other arguments."""
    if argv and argv[0].startswith("--tyro-"):
        return None, list(argv)  # shell completion, of the whole command
    values = tyro.conf.UseAppendAction[tuple[str, ...]]
    option: Any = dataclasses.make_dataclass("Option", [(name, values, ())])
    found, rest = parse(option, argv, add_help=False, return_unknown_args=True)
    return next(reversed(getattr(found, name)), None), rest


def given_fields(argv: Sequence[str] | None = None) -> set[str]:
    """Names of the fields that a command line sets, such as `data.train`."""
    argv = current_flags(sys.argv[1:] if argv is None else argv)
    flags = (word.partition("=")[0] for word in argv if word.startswith("--config."))
    return {flag.removeprefix("--config.").replace("-", "_") for flag in flags}


def parse_args(
    cls: type,
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    source: str = "config",
    read: Callable[[str], Config] = load_config,
    resolve: Callable[[Any, Config], Config] | None = None,
) -> Any:
    """Parses a command line into `cls`, a dataclass whose first field is `config: ConfigFlags`.

    `--SOURCE VALUE` says what the configuration is read from, and `--config.NAME=VALUE`
    overrides its fields. Unknown names and wrong values end with a message that shows the
    nearest valid name.

    Args:
      cls: frozen dataclass of the command's options.
      argv: arguments, those of the process by default.
      description: what `--help` begins with.
      source: name of the option that names the configuration.
      read: from that option's value to the configuration.
      resolve: called with the options, and with the configuration before the flags; gives the
        final configuration.
    """
    argv = current_flags(sys.argv[1:] if argv is None else argv)
    own_field = source in {f.name for f in dataclasses.fields(cls)} and source != "config"
    # The configuration comes first: its values are the defaults of the flags.
    given, rest = _taken_out(argv, source)
    if given is not None:
        base = read(given)
    elif own_field and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"--{source} is missing (--help shows all options)")
    else:
        base = load_config("standard")
    args: Any = parse(cls, argv if own_field else rest, description, default=cls(config=base))
    if resolve is not None:
        args = dataclasses.replace(args, config=resolve(args, base))
    return args


def tiny(config: Config) -> Config:
    """The configuration at test size; components start at random and keep their freeze flags."""
    fewer = {
        "train.batch_size": min(config.train.batch_size, 2),
        "train.accumulation_steps": min(config.train.accumulation_steps, 2),
    }
    none = dict.fromkeys(
        f"pretrained.{component}" for component in ("siglip", "vq", "decoder", "htfa", "run")
    )
    return override(
        config, SIZES | fewer | none | {"pretrained.random_components": "as_configured"}
    )
