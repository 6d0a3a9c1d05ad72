"""Work directory: configuration check and atomic writes."""

import json
import os
import socket
import tempfile
from pathlib import Path

import jax

from prom_jax.config import default
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

# What may change between a run and its resumption, as it does not change the result. (What a probe found says
# by itself which tables it is of.)
MAY_CHANGE = (
    "mesh", "checkpoint", "export", "remat", "attention", "batch.accumulation", "eval.every", "trackers",
    "probe.tables",
)  # fmt: skip

# What names data and models, which may have moved: compared by what they hold, which these keys keep.
NAMES = {
    "records": (
        "data.english", "data.target", "data.translation", "data.text", "data.english_text", "data.streams",
        "data.template", "eval.text",
    ),
    "base": ("model",),
}  # fmt: skip
CONFIG_FILE = "config.json"
# What it holds besides the configuration and `format`.
BESIDES = ("records", "prompts_shared", "base", "versions")
# Of what a run keeps: the trees of parameters and optimizer state, and the records. 1, which no file says: up
# to commit f878607.
FORMAT = 2


def as_dict(config) -> dict:
    """An ml_collections configuration in JSON's types."""
    return json.loads(config.to_json())


def write_config(workdir: Path, config: dict):
    """Writes the configuration that a run has from its start, for `check_same_config`; process 0 does.

    Args:
      workdir: of the run.
      config: as `as_dict` gives it, and what else must stay the same.

    Raises:
      UserError: if it cannot be written.
    """
    write_json(workdir / CONFIG_FILE, {"format": FORMAT} | config)


def check_format(path, number):
    """Checks that what a run has kept can be read by this version.

    Args:
      path: the file that says its format.
      number: the format that it says; None where it says none.

    Raises:
      UserError: if the format is another one.
    """
    if number != FORMAT:
        found = 1 if number is None else number
        raise UserError(
            f"{path} is of a run or checkpoint of format {found!r:.100}, this version has {FORMAT} and "
            "cannot go on with it: give another --workdir or checkpoint.directory to start anew, or use the "
            "version that wrote it; a Hugging Face export of it loads (hf/ of the run, or what "
            "`python -m prom_jax.convert to_hf` of that version makes)"
        )


def check_same_config(workdir: Path, config: dict):
    """Checks that a folder holds no run of another configuration.

    Args:
      workdir: of the run.
      config: what must be the same, as `as_dict` gives it; a part of what `write_config` wrote suffices. Of
        data and models that is what they hold, under the keys of `NAMES`, and their names only where the run
        has kept no more.

    Raises:
      UserError: if there is one, or one of another version of prom_jax; what differs is named.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or give another --workdir") from error
        check_format(path, content.get("format"))
        # A key that came after the run was begun was at its default.
        theirs, ours = flat(as_dict(default())) | flat(content), flat(config)
        names = {name for key, names in NAMES.items() if key in content for name in names}
        for key, value in ours.items():
            may_change = key.startswith(MAY_CHANGE) or key in names or (key in NAMES and key not in content)
            if theirs.get(key) != value and not may_change:
                named = [
                    name
                    for name in NAMES.get(key, ())
                    if theirs.get(name) != ours.get(name, theirs.get(name))
                ]
                changed = ", ".join(
                    f"{name}={theirs.get(name)!r}, now {ours.get(name)!r}" for name in named or [key]
                )
                raise UserError(
                    f"{workdir} holds a run with {changed}: give another --workdir, or remove it to "
                    "start afresh"
                )


def recorded_versions(workdir: Path) -> dict[str, str] | None:
    """Of the packages that the run in a folder was begun with; empty where that was not kept yet, None where
    the folder has lost its configuration."""
    if not (workdir / CONFIG_FILE).exists():
        return None
    return json.loads((workdir / CONFIG_FILE).read_text(encoding="utf-8")).get("versions", {})


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
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes):
    """Writes a file whole or not at all; process 0 does.

    Raises:
      UserError: if it cannot be written; what was there stays.
    """
    if not is_main_process():
        return
    make_directory(path.parent)
    try:
        descriptor, partial = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}-"
        )  # of its own: two may write
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.chmod(partial, 0o644)  # as other files: a temporary one is its owner's alone
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """What a user is told of a file that cannot be written."""
    return UserError(f"{path} cannot be written ({error.strerror}): free some space, or give another place")


def flat(tree: dict, prefix: str = "") -> dict:
    """A nested dict with dotted keys."""
    items = {}
    for key, value in tree.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items
