"""A configuration from a file `FILE[:variant]` and the command line's overrides of its keys."""

import difflib
import importlib.machinery
import json
import types
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from prom_jax.config import default
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import BESIDES, check_format, flat

# The configurations that come with the package: a link to configs/ in the repository.
OWN = Path(__file__).parents[1] / "resources" / "configs"
# What a value of each type is called where another one was given.
EXPECTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple: "a tuple such as ('a','b'), or the flag once for each value",
}


def load(name: str) -> ConfigDict:
    """The configuration that a file's `get_config` makes, or that a run has kept.

    Args:
      name: the path of a Python file, or the name of a configuration that comes with the package ('th'),
        with an optional variant after a colon; or the config.json of a work directory.

    Returns:
      The configuration, locked: no key can be added.

    Raises:
      UserError: if there is no such file, it makes no configuration, or has no such variant.
    """
    if name.endswith(".json"):
        return _of_run(Path(name)).lock()
    path, _, variant = name.partition(":")
    if path in (own := {file.stem: str(file) for file in sorted(OWN.glob("*.py"))}):
        path = own[path]
    if not Path(path).is_file():
        raise UserError(
            f"{path} does not exist: --config expects a configuration file, such as configs/demo.py, or one "
            f"of {', '.join(own)}"
        )
    loader = importlib.machinery.SourceFileLoader("configuration_file", path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    try:
        loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever the file does
        raise UserError(
            f"{path} makes no configuration ({type(error).__name__}: {error}): expected a Python file with a "
            "function get_config(variant), such as configs/demo.py"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {path} returns {type(config).__name__}: expected an ml_collections.ConfigDict, "
            "as prom_jax.config.default() makes"
        )
    return config.lock()


def _of_run(path: Path) -> ConfigDict:
    """The configuration in a work directory's config.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_format(path, content.pop("format", None))
        for key in BESIDES:
            content.pop(key, None)
        config = default()
        for key, value in flat(content).items():
            if (
                key == "data.stream_share" and not value
            ):  # a key of an earlier version, which this one has not
                continue
            _value(config, key, str(path))
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no config.json of a run ({type(error).__name__}: {error})") from error
    return config


def override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    """Sets keys of a configuration, each to a value of the type that it has.

    Args:
      config: is changed.
      overrides: flags `--config.KEY=VALUE`; for a truth value also `--config.KEY` and `--noconfig.KEY`. A
        tuple is one value, `('a','b')`, or its flag once for each value, or nothing; of other keys the last
        flag counts.

    Returns:
      `config`.

    Raises:
      UserError: for a key that the configuration does not have, or a value of another type.
    """
    by_key: dict[str, list[str]] = {}
    for flag in overrides:
        by_key.setdefault(flag.partition("=")[0].partition("config.")[2], []).append(flag)
    for key, given in by_key.items():
        kind = type(_value(config, key, given[-1]))
        expected = EXPECTED[kind]
        values = flags.FlagValues()  # of our own: those of the process stay as they are
        arguments = ["", *(f"{flag}()" if kind is tuple and flag.endswith("=") else flag for flag in given)]
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
            values(arguments)
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(f"{given[-1]}: expected {expected}") from error
    return config


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a misspelt `name` most likely means; None if it is like none of them."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _value(config: ConfigDict, key: str, flag: str):
    """The value of a dotted key; raises UserError where there is none."""
    node = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            keys = _keys(config)
            leaves = {known.rpartition(".")[2]: known for known in keys}
            meant = nearest(key, keys) or leaves.get(nearest(key.rpartition(".")[2], leaves) or "")
            hint = f"did you mean --config.{meant}? " * bool(meant)
            raise UserError(
                f"unknown configuration key {part!r} in {flag}: {hint}prom_jax/config.py lists them all"
            )
        node = node[part]
    if isinstance(node, ConfigDict):
        raise UserError(f"{flag}: {key} is a group: set one of {', '.join(_keys(node, f'{key}.'))}")
    return node


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all values."""
    keys = []
    for name, value in config.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name}"]
    return keys
