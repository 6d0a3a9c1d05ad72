"""What the commands share: a config flag with one-line errors."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from prom_jax.errors import UserError


def define_config_flag():
    """Defines `--config=FILE[:variant]`, locked: a key that the file does not have is an error."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with an optional variant: configs/th.py:bactrian",
        lock_config=True,
    )


def run(main):
    """Parses flags and runs `main()`; a user's mistake ends it with one line and exit status 2."""

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            _fail(_first_line(error))

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags are given as --name=value")
        guard(main)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def guard(main):
    """Runs `main()`; a user's mistake ends it with one line and exit status 2."""
    try:
        main()
    except UserError as error:
        _fail(error)


def _first_line(error) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return (str(message).strip().splitlines() or [type(error).__name__])[0]


def _fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
