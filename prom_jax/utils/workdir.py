"""Work directory: the check that it holds no other run, and atomic writes."""

import json
import os
import socket
import tempfile
from pathlib import Path

import jax

from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

# What may change between a run and its resumption, as it does not change the result.
MAY_CHANGE = ("mesh", "checkpoint", "export", "remat", "attention", "batch.accumulation", "eval.every")

CONFIG_FILE = "config.json"
# Of what a run keeps in its work directory; another number for every change after which it cannot go on.
FORMAT = 2


def as_dict(config) -> dict:
    """An ml_collections configuration in JSON's types."""
    return json.loads(config.to_json())


def check_same_config(workdir: Path, config: dict):
    """Raises UserError if the folder holds a run of another configuration, or of another version of
    prom_jax; what differs is named."""
    path = workdir / CONFIG_FILE
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            held = theirs.get("format")
            theirs = _flat(theirs)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or give another --workdir") from error
        if held != FORMAT:
            raise UserError(
                f"{workdir} holds a run of another version of prom_jax ({_format(held)}, expected format "
                f"{FORMAT}), which cannot be continued: give another --workdir; its export, "
                f"{workdir / 'hf'}, still loads"
            )
        for key, value in _flat(config).items():
            if theirs.get(key) != value and not key.startswith(MAY_CHANGE):
                raise UserError(
                    f"{workdir} holds a run with {key}={theirs.get(key)!r}, now {value!r}: give another "
                    "--workdir, or remove it to start afresh"
                )


def check_shared(path: Path):
    """Raises UserError where a process does not see a folder that process 0 has made."""
    if not path.is_dir():
        raise UserError(
            f"{path} was made by process 0 and cannot be seen from process {jax.process_index()} on "
            f"{socket.gethostname()}: give a --workdir on storage that all hosts share"
        )


def make_directory(path: Path):
    """Makes a folder if there is none; raises UserError where none can be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made a folder ({error.strerror}): give another place") from error


def write_json(path: Path, content):
    """Writes a file whole or not at all; process 0 does."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str):
    """Writes a file whole or not at all; process 0 does."""
    if not is_main_process():
        return
    make_directory(path.parent)
    try:
        descriptor, partial = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}-"
        )  # of its own: two may write
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(partial, 0o644)  # as other files: a temporary one is its owner's alone
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, or give another place"
        ) from error


def _format(number) -> str:
    return "without a format number" if number is None else f"format {number}"


def _flat(tree: dict, prefix: str = "") -> dict:
    """A nested dict with dotted keys."""
    items = {}
    for key, value in tree.items():
        items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items
