"""The command line that all commands share: flags of one style, configuration files, mistakes in one line."""

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from prom_jax.utils import command, config_file
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import INTERRUPTED, MISTAKE
from prom_jax.utils.workdir import CONFIG_FILE

# What commands compile is kept, small programs too, as there are dozens of them; the environment may say
# otherwise under the same names.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("~/.cache/prom_jax/compiled").expanduser()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
}
WIDTH = 110  # of --help at most
_FLAG = re.compile(r"--[A-Za-z][\w.-]*(?==|$)")


class Parser(argparse.ArgumentParser):
    """argparse with flags in the style of this project, whose mistakes are `UserError`s.

    Flags are never shortened, `-` and `_` in their names are the same, an unknown one is answered with the
    nearest known one, and --help tells the default of each.

    Args:
      module: the one that is run, such as 'prom_jax.train'.
      about: its docstring: how it is called, and what it does.
    """

    def __init__(self, module: str, about: str):
        super().__init__(
            prog=f"python -m {module}",
            usage=argparse.SUPPRESS,  # the docstring begins with it
            description=about,
            epilog="Flags are given as --name=value or --name value; - and _ in names are the same.",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._has_config = False

    def add_run(self):
        """Adds `--config=FILE[:variant]`, with `--config.KEY=VALUE` for each key of it, and `--workdir`.

        `parse_args` then gives the configuration as `config`, a Path as `workdir`, and as `run` the flags
        that lead to the same two, for a shell.
        """
        self._has_config = True
        group = self.add_argument_group("run")
        group.add_argument(
            "--config",
            metavar="FILE[:variant]",
            help="configuration file, or the name of one that comes with the package, and a variant of it: "
            "configs/th.py:bactrian or th:bactrian; or the config.json of a run (default: that of --workdir)",
        )
        group.add_argument(
            "--config.KEY",
            metavar="VALUE",
            help="sets a key of the configuration, such as --config.pivot.weight=0.3; prom_jax/config.py has "
            "all keys, each with its meaning (default: that of the file)",
        )
        workdir = "where the run goes (default: runs/<config>[-variant])"
        group.add_argument("--workdir", metavar="DIR", help=workdir)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's, with what `add_run` promises.

        Raises:
          UserError: for what the command line has too much, too little, or wrong.
        """
        arguments = _with_underscores(sys.argv[1:] if args is None else args)
        arguments, overrides = _split(arguments) if self._has_config else (arguments, [])
        arguments = [*self._without_values(arguments)]
        self._check_known(arguments)
        result, extra = self.parse_known_args(arguments, namespace)
        if extra:
            raise UserError(f"unexpected argument {extra[0]!r}: flags are given as --name=value")
        if self._has_config:
            if result.config is None and result.workdir and (Path(result.workdir) / CONFIG_FILE).is_file():
                result.config = str(Path(result.workdir) / CONFIG_FILE)
            if result.config is None:
                raise UserError(
                    "--config is missing: for example --config=configs/demo.py, or --workdir=DIR alone to go "
                    "on with the run that it holds"
                )
            result.workdir = Path(result.workdir or _default_workdir(result.config))
            result.run = shlex.join([f"--config={result.config}", *overrides, f"--workdir={result.workdir}"])
            result.config = config_file.override(config_file.load(result.config), overrides)
        return result

    def error(self, message: str):
        """Raises UserError, in place of printing usage and ending the process."""
        missing = message.partition("the following arguments are required: ")[2]
        if missing:
            about = {name: action.help for action in self._actions for name in _names(action)}
            raise UserError("; ".join(f"{name} is missing: {about[name]}" for name in missing.split(", ")))
        message = message.removeprefix("argument ").replace(": =", "=", 1)  # of a type's own: --flag=value
        raise UserError(f"{message} (--help lists all flags)")

    def _without_values(self, arguments: list[str]):
        """Switches as argparse knows them: --name for --name=true, nothing for --name=false and --noname."""
        switches = {
            name
            for name, action in self._option_string_actions.items()
            if action.nargs == 0 and name != "--help"
        }
        for argument in arguments:
            name, has_value, value = argument.partition("=")
            if argument.startswith("--no") and f"--{argument[4:]}" in switches:
                continue
            if name not in switches or not has_value:
                yield argument
            elif value.lower() not in ("true", "false"):
                raise UserError(f"{argument}: expected true or false, or {name} alone")
            elif value.lower() == "true":
                yield name

    def _check_known(self, arguments: list[str]):
        # Before argparse, which would first miss what is misspelt.
        for argument in arguments:
            if argument == "--":
                return
            flag = _FLAG.match(argument)
            if flag and flag[0] not in self._option_string_actions:
                meant = config_file.nearest(flag[0], self._option_string_actions)
                hint = f"did you mean {meant}? " * bool(meant)
                raise UserError(f"unknown flag {flag[0]}: {hint}--help lists all flags")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Tells every flag's default, unless its help does."""

    def __init__(self, prog: str):
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        about = action.help or ""
        if not action.option_strings or action.default is argparse.SUPPRESS:
            return about
        if action.required:
            remark = "required"
        elif "(default" in about or "(required)" in about:
            return about
        else:
            remark = f"default: {_shown(action.default)}"
        return f"{about} ({remark})".lstrip().replace("%", "%%")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that is an integer of at least `least`."""

    def bounded(text: str) -> int:
        value = integer(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"={text}: expected {least} or more")
        return value

    return bounded


def integer(text: str) -> int:
    """The type of a flag that is an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"={text}: expected an integer") from error


def number(text: str) -> float:
    """The type of a flag that is a number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"={text}: expected a number") from error


def names(text: str) -> list[str]:
    """The type of a flag that is one or more names with commas between."""
    found = [name for name in text.split(",") if name]
    if not found:
        raise argparse.ArgumentTypeError(f"={text}: expected one or more names, with commas between")
    return found


def versions(*more: str) -> dict[str, str]:
    """Of the packages that measured numbers depend on, and of some `more`."""
    return {name: importlib.metadata.version(name) for name in ("jax", "transformers", "numpy", *more)}


def guard(main: Callable[[], object]):
    """Runs `main()`, keeping what it compiles for the next time; a user's mistake ends it with one line and
    exit status 2, Ctrl-C with one line and 130."""
    command.quiet_libraries()
    command.print_anything()
    for name, value in COMPILED.items():
        if name not in os.environ:
            jax.config.update(name.lower(), value)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(MISTAKE) from error
    except KeyboardInterrupt as error:
        print("interrupted: what is whole stays, and the same command goes on with it", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from error


def _with_underscores(arguments: list[str]) -> list[str]:
    """The arguments with `_` for `-` in names of flags, up to `--`, which ends these."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [*map(_with_underscore_name, arguments[:end]), *arguments[end:]]


def _with_underscore_name(argument: str) -> str:
    flag = _FLAG.match(argument)
    return f"--{flag[0][2:].replace('-', '_')}{argument[flag.end() :]}" if flag else argument


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without overrides of the configuration, and these, each as one: `--config.KEY=VALUE`."""
    rest, overrides = [], []
    remaining = iter(arguments)
    pending = next(remaining, None)
    while pending is not None:
        argument, pending = pending, next(remaining, None)
        if not re.match(r"--(no)?config\.", argument):
            rest.append(argument)
        elif "=" in argument or pending is None or pending.startswith("--"):
            overrides.append(argument)
        else:
            overrides.append(f"{argument}={pending}")
            pending = next(remaining, None)
    return rest, overrides


def _names(action: argparse.Action) -> tuple[str, ...]:
    return tuple(action.option_strings) or (str(action.metavar or action.dest),)


def _default_workdir(config: str) -> Path:
    if config.endswith(".json"):  # of a run, which goes on
        return Path(config).parent
    path, _, variant = config.partition(":")
    return Path("runs") / "-".join(filter(None, (Path(path).stem, variant)))


def _shown(default) -> str:
    if default is None or default == "":
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
