"""Models as Hugging Face has them: finding a folder or fetching it, and the model card of an export."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

from prom_jax.utils.errors import UserError

ADAPTED = (
    "A language model adapted to another language by instruction tuning with prom_jax.\n"
    "Prompts follow the chat template of its tokenizer."
)
CONVERTED = "A language model converted by prom_jax."
HUB_ID = r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.][\w./-]*))?"
_CARD_TAG = "prom_jax"  # marks a folder as an export, which the next may replace


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
                allow_patterns=["*.json", "*.jinja", "tokenizer.model", *["*.safetensors"] * weights],
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
    ours = f"- {_CARD_TAG}" in lines
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


def public(card: Mapping[str, object]) -> dict:
    """A model card's rows, without the path of a base model on this machine, which says nothing to others.

    Args:
      card: the rows.
    Returns:
      The same, with the last name of the path in place of it.
    """
    base = str(card.get("base_model", ""))
    return {**card, "base_model": Path(base).name} if base and Path(base).exists() else dict(card)


def model_card(card: Mapping[str, object]) -> str:
    """A model card, whose tag marks its folder as an export.

    Args:
      card: its rows; 'base_model', where it is a hub id, and 'language' also go to the hub's metadata.
    Returns:
      The content of a `README.md`.
    """
    base = str(card.get("base_model", ""))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[_CARD_TAG],
        base_model=base if "/" in base else None,
        language=str(card.get("language", "")) or None,
    )
    about = ADAPTED if "method" in card else CONVERTED
    rows = "".join(f"| {key} | {value} |\n" for key, value in card.items())
    return str(ModelCard(f"---\n{data}\n---\n\n# Model card\n\n{about}\n\n| | |\n|---|---|\n{rows}"))
