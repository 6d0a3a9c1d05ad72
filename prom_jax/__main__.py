"""prom-jax COMMAND [flags of the command]; `python -m prom_jax COMMAND` is the same

Adapts English-centric LLMs to another language. `prom-jax COMMAND --help` tells the flags of one:
"""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

from prom_jax.utils import cli
from prom_jax.utils.config_file import nearest
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import COMMANDS, require


def main(argv: list[str] | None = None) -> None:
    """Runs one of the commands, as `python -m prom_jax.COMMAND` does."""
    arguments = sys.argv[1:] if argv is None else argv

    def run() -> None:
        command = arguments[0] if arguments else "--help"
        if command in ("-h", "--help"):
            print(__doc__, *map(summary, COMMANDS), sep="\n")
            return
        if command not in COMMANDS:
            meant = nearest(command, COMMANDS)
            hint = f"did you mean {meant}? " * bool(meant)
            raise UserError(f"unknown command {command!r}: {hint}expected one of {', '.join(COMMANDS)}")
        require(*COMMANDS[command])
        importlib.import_module(f"prom_jax.{command}").main(arguments[1:])

    cli.guard(run)


def summary(command: str) -> str:
    """A command and the first sentence of its docstring after the usage, without importing it."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    paragraphs = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    sentence = " ".join(paragraphs[1].split()).partition(". ")[0].rstrip(".")
    return textwrap.fill(
        f"{command:<13} {sentence}", cli.WIDTH, initial_indent="  ", subsequent_indent=" " * 16
    )


if __name__ == "__main__":
    main()
