"""What the commands share: a config flag with one-line errors."""

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from prom_jax.parallel.multihost import MISTAKE, run_distributed
from prom_jax.parallel.sharding import AXES, make_mesh
from prom_jax.utils import command
from prom_jax.utils.errors import UserError

# What commands compile is kept, small programs too, as there are dozens of them; the environment may say
# otherwise under the same names.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(Path("~/.cache/prom_jax/compiled").expanduser()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
}
_number = lambda name: int(os.environ[name]) if os.environ.get(name, "").isdigit() else None
# Name, type, default and meaning of what `processes` takes.
PROCESS_FLAGS = (
    (
        "coordinator",
        str,
        None,
        "host:port of process 0 in a run of several processes, where the environment does not tell; "
        "default $JAX_COORDINATOR_ADDRESS",
    ),
    ("num_processes", int, _number("JAX_NUM_PROCESSES"), "Default $JAX_NUM_PROCESSES"),
    ("process_id", int, _number("JAX_PROCESS_ID"), "From 0 on; default $JAX_PROCESS_ID"),
    ("connect_timeout", float, 300.0, "Seconds until all processes must have come"),
    ("hang_timeout", float, 3600.0, "Seconds after which a step that hangs ends the run; 0: never"),
)


def define_run_flags():
    """Defines `--config=FILE[:variant]`, locked: a key that the file does not have is an error; and
    `--workdir`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with an optional variant: configs/th.py:bactrian",
        lock_config=True,
    )
    flags.DEFINE_string("workdir", None, "Where the run goes; default runs/<config>[-variant]")


def define_process_flags():
    """Defines what `processes` takes."""
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, kind, default, about in PROCESS_FLAGS:
        define[kind](name, default, about)


def add_processes(parser):
    """Adds what `processes` takes to an argparse parser."""
    for name, kind, default, about in PROCESS_FLAGS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=about)


def processes(arguments=None):
    """A context in which this process runs in step with those that the flags (or argparse's `arguments`) or
    the environment tell of; see `distributed.run_distributed`."""
    value = (lambda name: flags.FLAGS[name].value) if arguments is None else arguments.__getattribute__
    return run_distributed(**{name: value(name) for name, *_ in PROCESS_FLAGS})


def config():
    """The configuration that was given.

    Raises:
      UserError: none was.
    """
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: for example --config=configs/demo.py")
    return flags.FLAGS.config


def workdir() -> Path:
    """The folder of the run, by default runs/<name of the config file>[-variant]."""
    if flags.FLAGS.workdir:
        return Path(flags.FLAGS.workdir)
    name, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(".py:")
    return Path("runs") / "-".join(filter(None, (Path(name).stem, variant)))


def run(main):
    """Parses flags and runs `main()`; a user's mistake ends it with one line and exit status 2."""

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags are given as --name=value")
        guard(main)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=_parse)


def parser(command: str, about: str) -> argparse.ArgumentParser:
    """For a command without configuration."""
    return argparse.ArgumentParser(
        prog=f"python -m prom_jax.{command}",
        description=about,
        formatter_class=argparse.RawTextHelpFormatter,
    )


def add_compute(parser, data: int = 1, fsdp: int = -1, tensor: int = 1):
    """Adds the dtype of computing and the mesh's sizes, with these defaults, to an argparse parser."""
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--compute_dtype", choices=dtypes, help="default: float32 on CPU, bfloat16 elsewhere")
    for axis, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        parser.add_argument(f"--mesh.{axis}", type=int, default=size, help=f"devices; default {size}")


def mesh(arguments):
    """The mesh that `add_compute`'s arguments ask for."""
    return make_mesh(*(getattr(arguments, f"mesh.{axis}") for axis in AXES))


def versions(*more: str) -> dict[str, str]:
    """Of the packages that measured numbers depend on, and of some `more`."""
    return {name: importlib.metadata.version(name) for name in ("jax", "transformers", "numpy", *more)}


def guard(main):
    """Runs `main()`, keeping what it compiles for the next time; a user's mistake ends it with one line and
    exit status 2."""
    command.quiet_libraries()
    for name, value in COMPILED.items():
        if name not in os.environ:
            jax.config.update(name.lower(), value)
    try:
        main()
    except UserError as error:
        _fail(error)


def _parse(argv):
    for argument in argv:
        path = Path(argument.removeprefix("--config=").split(":")[0])
        if argument.startswith("--config=") and not path.is_file():
            _fail(f"{path} does not exist: --config expects a configuration file, such as configs/demo.py")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError) as error:
        _fail(_explain(error, argv))


def _explain(error, argv) -> str:
    """What went wrong, in one line."""
    cause = error
    while cause and not isinstance(cause, KeyError):
        cause = cause.__context__
    if cause:
        key = str(cause.args[0]).splitlines()[0].strip("'\"")  # a suggestion may follow
        given = [a for a in argv if a.startswith("--config.") and key in a.split("=")[0].split(".")]
        return f"unknown configuration key {key!r} in {', '.join(given)}: prom_jax/config.py lists them all"
    return (
        str(error).strip().splitlines()[-1].split("UserError: ")[-1]
    )  # a config file's come with a traceback


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(MISTAKE)
