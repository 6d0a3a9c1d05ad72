"""Packages that only some commands need: which extra brings them, and one error where they are missing.

What imports such a package says so:

    with needs("data"):
        import grain
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from prom_jax.utils.errors import UserError
from prom_jax.utils.process import MISTAKE

# Of each extra in pyproject.toml: what it lets one import.
EXTRAS = {
    "data": ("datasets", "tensorflow_datasets", "array_record", "grain", "py3langid"),
    "report": ("matplotlib",),
    "eval": ("lm_eval", "datasets", "pythainlp", "py3langid", "sacrebleu"),
    "translate": ("google.cloud.translate_v3", "ctranslate2", "sentencex"),
    "gcs": ("gcsfs",),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
# Of each command: the extras without which it does not start.
COMMANDS = {
    "train": ("data", "report"),
    "prepare": ("data", "report"),
    "regulate": ("data", "report"),
    "interference": ("data", "report"),
    "probe": ("report",),
    "report": ("report",),
    "evaluate": ("eval",),
    "generate": (),
    "convert": (),
}


class MissingExtra(UserError, ImportError):
    """Packages of an extra are not installed."""


@contextlib.contextmanager
def needs(extra: str):
    """Around imports of packages that come with an extra.

    Raises:
      MissingExtra: if one of them is not installed; the command that is starting ends with that line instead.
    """
    try:
        yield
    except ModuleNotFoundError:
        command = _starting_command()
        try:
            require(extra, *COMMANDS.get(command, ()))
        except MissingExtra as missing:
            if not command:
                raise missing from None
            print(f"error: {missing}", file=sys.stderr)
            raise SystemExit(MISTAKE) from None
        raise  # the package is there, and lacks something itself


def require(*extras: str) -> None:
    """Checks that the packages of some extras are installed.

    Raises:
      MissingExtra: if not; it names all that are missing and the command that installs them.
    """
    missing = {
        extra: absent for extra in dict.fromkeys(extras) if (absent := [*filter(_is_absent, EXTRAS[extra])])
    }
    if missing:
        packages = ", ".join(dict.fromkeys(package for absent in missing.values() for package in absent))
        raise MissingExtra(f"not installed: {packages}. Install it with: {_pip_install(missing)}")


def _is_absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # of what it is in
        return True


def _starting_command() -> str:
    """The command that `python -m prom_jax.…` is importing; empty in any other program."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    package, _, command = (spec.name if spec else "").partition(".")
    return command if package == "prom_jax" and command in COMMANDS else ""


def _pip_install(extras) -> str:
    """The command for whoever has installed prom_jax, or for a checkout that is not installed."""
    names = ",".join(extras)
    try:
        importlib.metadata.distribution("prom_jax")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install -e '{Path(__file__).parents[2]}[{names}]'"
    return f"pip install 'prom_jax[{names}]'"
