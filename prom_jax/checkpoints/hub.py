"""Models as Hugging Face has them: finding a folder or fetching it, writing one, and pushing it."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import jax
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from jax.experimental import multihost_utils

from prom_jax.checkpoints import model_card
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

FILES = ("*.json", "*.jinja", "tokenizer.model", "README.md")  # of a model besides its weights
HUB_ID = r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.][\w./-]*))?"


def local_path(source, weights: bool = True) -> Path:
    """The path of a model on this machine: a directory or a `.gguf` file, downloaded if `source` is a hub id.

    Args:
      source: a path, or a hub id `owner/name` or `owner/name@revision`.
      weights: whether they are downloaded too.

    Returns:
      The path.

    Raises:
      UserError: if there is no such path, and no such model on the hub or no access to it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_entries(path)
        return path
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        raise UserError(f"{path} is not a model: expected a Hugging Face directory or a .gguf file")
    named = re.fullmatch(HUB_ID, str(source))
    if not named or path.suffix == ".gguf":
        raise UserError(
            f"{source} does not exist: expected a Hugging Face directory, a .gguf file or a hub id "
            "owner/name, or owner/name@revision"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                named["id"],
                revision=named["revision"],
                allow_patterns=[*FILES, *["*.safetensors"] * weights],
                ignore_patterns=["consolidated*", "original/*"],  # the same weights once more
            )
        )
    except RevisionNotFoundError as error:
        raise UserError(
            f"{named['id']} has no revision {named['revision']!r}: expected a branch, a tag or a commit that "
            "its page on the hub lists"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{source} is gated: ask for access on its page on the hub and log in with "
            "`hf auth login`, or give the path of a local copy"
        ) from error
    except Exception as error:  # the client's own, the network library's and the system's
        raise UserError(
            f"{source} is no local path, and the hub gave no such model ({type(error).__name__}): check the "
            "spelling and the connection, for a private or gated model ask for access and log in with "
            "`hf auth login`, or give the path of a local copy"
        ) from error


def _check_entries(folder: Path):
    """Refuses links that lead out of a folder, and what cannot be read to an end, such as a pipe."""
    root = Path(os.path.realpath(folder))
    inside = [root]
    if root.parent.name == "snapshots":  # of the hub's cache, whose files are links to ../../blobs
        inside.append(root.parents[1] / "blobs")
    for entry in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        place = Path(os.path.realpath(entry))
        if not (place.is_file() or place.is_dir()) or not any(map(place.is_relative_to, inside)):
            raise UserError(
                f"{entry} is a link that leads out of its folder, or no file: expected the files "
                "themselves; put a copy in its place"
            )


def prepare_folder(directory: Path, partial: Path, num_bytes: int):
    """Makes the folder to write in, having made sure that it can take its place and that it fits.

    Args:
      directory: where the folder is to be in the end.
      partial: the folder to write in.
      num_bytes: that will be written.

    Raises:
      UserError: if `directory` is anything but a new place or an earlier export, or the disk is too full.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: expected a directory; choose another place")
    card = directory / "README.md"
    # By its line: a README of others' may be none that ModelCard reads.
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines() if card.exists() else []
    ours = f"- {model_card.TAG}" in lines
    if directory.exists() and any(directory.iterdir()) and not ours:
        raise UserError(
            f"{directory} is not empty and no earlier export: expected a new place; choose another one"
        )
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        raise UserError(
            f"{directory} needs {num_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there: "
            "free some space or choose another place"
        )


def replace_folder(directory: Path, partial: Path):
    """Puts a folder in its place, where an earlier export may be."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(directory, num_bytes: int):
    """A folder to write in, which takes its place at the end, whole or not at all. All processes must come
    here; process 0 writes.

    Args:
      directory: where the folder is to be in the end: a new place, or that of an earlier export.
      num_bytes: that will be written.

    Yields:
      The folder to write in.

    Raises:
      UserError: if the directory holds something else, or cannot be written.
    """
    directory = Path(directory).resolve()
    partial = directory.with_name(f".{directory.name}.partial")
    writer = is_main_process()
    try:
        if writer:
            prepare_folder(directory, partial, num_bytes)
        yield partial
        if writer:
            replace_folder(directory, partial)
    except OSError as error:
        raise UserError(
            f"{directory} could not be written ({error}): free some space or choose another place; "
            "nothing was left there"
        ) from error
    finally:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("whole_folder")


def check_can_push(repository: str):
    """Raises UserError unless a name could be a repository's, and there is a token to write with."""
    named = re.fullmatch(HUB_ID, repository)
    if not named or named["revision"]:
        raise UserError(f"export.hub={repository!r}: expected owner/name, as of a model on the hub")
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"export.hub={repository!r} needs a token that may write: log in with `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(directory, repository: str) -> str:
    """Uploads an export to the hub, into a repository that is made private where it is new.

    Args:
      directory: the export's folder.
      repository: owner/name.

    Returns:
      The address of its page.

    Raises:
      UserError: if it could not be uploaded; the folder stays as it is.
    """
    check_can_push(repository)
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        page = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export of prom_jax")
    except Exception as error:  # the client's own, the network library's and the system's
        raise UserError(
            f"{repository} was not pushed ({type(error).__name__}): the export in {directory} is whole; see "
            f"whether the token may write there, and push it with `hf upload {repository} {directory}`"
        ) from error
    return str(page)
