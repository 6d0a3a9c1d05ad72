"""What the checkpoints of a directory are: `model.json` and `tokenizer/` next to the steps."""

import contextlib
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from prom_jax.checkpoints import generation
from prom_jax.checkpoints.storage import STORE_ERRORS, is_remote, reason, reraise_storage_errors, resolve_path
from prom_jax.models.auto import config_from_hf, config_to_hf
from prom_jax.models.config import DecoderConfig
from prom_jax.models.lora import LoRA
from prom_jax.tokenization import folder
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process
from prom_jax.utils.workdir import FORMAT, check_format

DESCRIPTION, TOKENIZER = "model.json", "tokenizer"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint's arrays are.

    Attributes:
      config: the architecture.
      heads: further LM heads, and after which block each reads.
      dtype: of the source's weights, the default of an export.
      details: for the model card.
      exits: blocks, besides those of heads, above which another stack begins.
      lora: the adapters, and heads of low rank; None for none.
      base: where adapters are trained alone, the model that they are for: its 'source' and 'fingerprint'.
    """

    config: DecoderConfig
    heads: dict[str, int]
    dtype: str
    details: dict
    exits: tuple[int, ...] = ()
    lora: LoRA | None = None
    base: dict | None = None

    def write(self, directory):
        """Writes `model.json`."""
        fields = {"format": FORMAT} | dataclasses.asdict(self) | {"config": config_to_hf(self.config)}
        fields["generation"] = self.config.generation
        path = resolve_path(directory) / DESCRIPTION
        partial = path.with_name(f".{path.name}.partial")  # there may be a whole one
        partial.write_text(json.dumps(fields, indent=2, ensure_ascii=False))
        partial.replace(path)

    @classmethod
    def read(cls, directory) -> "Description":
        """Reads `model.json`.

        Raises:
          UserError: if it is damaged, or of another version of prom_jax.
        """
        fields, path = _read(directory), resolve_path(directory) / DESCRIPTION
        with _naming_damage(path):
            for name, kind in (("config", dict), ("heads", dict), ("dtype", str), ("details", dict)):
                if not isinstance(fields[name], kind):
                    raise TypeError(f"{name} is {fields[name]!r:.100}")
            if not jnp.issubdtype(np.dtype(fields["dtype"]), jnp.floating):
                raise TypeError(f"dtype is {fields['dtype']!r:.100}")
            of_generation = generation.check(dict(fields.pop("generation", {})), path)
            config = dataclasses.replace(config_from_hf(fields["config"]), generation=of_generation)
            for head, layer in fields["heads"].items():
                inside = type(layer) is int and 0 < layer <= config.num_hidden_layers
                if not inside or not re.fullmatch(r"(?!lm_)[a-z]\w*_head", head, re.ASCII):
                    raise TypeError(f"heads has {head!r:.100} at {layer!r:.100}")
            exits = tuple(fields.get("exits", ()))
            if not all(type(layer) is int and 0 < layer < config.num_hidden_layers for layer in exits):
                raise TypeError(f"exits is {exits!r:.100}")
            lora = LoRA.from_dict(fields["lora"]) if fields.get("lora") else None
            base = fields.get("base")
            if (lora is not None and not lora.trains_base) != isinstance(base, dict):
                raise TypeError(f"base is {base!r:.100}")
            return cls(**fields | {"config": config, "exits": exits, "lora": lora})


def check_readable(directory):
    """Checks that the checkpoints in a directory, if it has any, are of the format of this version.

    Args:
      directory: of the steps.

    Raises:
      UserError: if they are of another one, or `model.json` is damaged.
    """
    with reraise_storage_errors(directory):
        described = (resolve_path(directory) / DESCRIPTION).is_file()
    if described:
        _read(directory)


def _read(directory) -> dict:
    """The fields of `model.json`, whose format is this version's."""
    path = resolve_path(directory) / DESCRIPTION
    with _naming_damage(path):
        fields = json.loads(path.read_text())
        number = fields.pop("format", None)
    check_format(path, number)
    return fields


@contextlib.contextmanager
def _naming_damage(path):
    try:
        yield
    except (*STORE_ERRORS, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): give another source") from error


def describe(directory, description: Description, model_tokenizer):
    """Writes what the checkpoints in a directory are, and their tokenizer; process 0 does.

    Args:
      directory: of the steps.
      description: what the arrays are.
      model_tokenizer: the model's.

    Raises:
      UserError: if they cannot be written.
    """
    if not is_main_process():
        return
    directory = resolve_path(directory)
    with reraise_storage_errors(directory), tempfile.TemporaryDirectory() as local:
        (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
        folder.save(model_tokenizer, Path(local), model_tokenizer.chat_template)
        for path in Path(local).iterdir():
            (directory / TOKENIZER / path.name).write_bytes(path.read_bytes())
    description.write(directory)


def read_tokenizer(directory):
    """The tokenizer that is saved with the checkpoints in `directory`."""
    with tempfile.TemporaryDirectory() as local:
        for path in (resolve_path(directory) / TOKENIZER).iterdir():
            (Path(local) / path.name).write_bytes(path.read_bytes())
        return folder.load(local)


def find(source) -> epath.Path | None:
    """Finds an Orbax checkpoint.

    Args:
      source: a directory of steps, one that holds such a directory as `checkpoints`, or one step.

    Returns:
      The directory of steps, or the one step; None if the source is none of these.

    Raises:
      UserError: if it is a place in an object store that is none of these or cannot be read.
    """
    place = resolve_path(source)
    with reraise_storage_errors(place):
        for directory in (place, place / "checkpoints"):
            if (directory / DESCRIPTION).is_file():
                return directory
        if place.name.isdecimal() and (place.parent / DESCRIPTION).is_file():
            return place
    if is_remote(place):
        raise UserError(
            f"{place} holds no checkpoint, or its bucket is not there: expected one that prom_jax wrote; "
            "other models must be on this machine"
        )
    return None
