"""Orbax checkpoints: the training state of some steps, and beside them what the model is.

    checkpoints/
      model.json     architecture, pivot layer, dtype of the source, how it was made
      tokenizer/     as Hugging Face saves it
      <step>/        params and, for training, optimizer state

The data position is the step number, so there is nothing else to keep.
"""

import dataclasses
import functools
import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from prom_jax import llama
from prom_jax.architecture import LlamaConfig
from prom_jax.errors import UserError
from prom_jax.readers import PIVOT_NAME
from prom_jax.sharding import param_sharding, path_keys
from prom_jax.tokenizer import save as save_tokenizer
from prom_jax.weights import hf_tensors

DESCRIPTION = "model.json"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint's arrays are.

    config: the architecture; pivot_layer: n, above which the second stack begins and whose output the pivot
    head reads (0: one stack and no such head); dtype: of the source's weights, the default of an export;
    details: for the model card.
    """

    config: LlamaConfig
    pivot_layer: int
    dtype: str
    details: dict

    def write(self, directory: Path):
        """Writes `model.json`."""
        fields = dataclasses.asdict(self) | {"config": self.config.to_hf()}
        (Path(directory) / DESCRIPTION).write_text(json.dumps(fields, indent=2, ensure_ascii=False))

    @classmethod
    def read(cls, directory: Path) -> "Description":
        """Reads `model.json`."""
        fields = json.loads((Path(directory) / DESCRIPTION).read_text())
        return cls(**fields | {"config": LlamaConfig.from_hf(fields["config"])})

    def abstract(self, **kwargs) -> llama.Llama:
        """The model in shapes; the keywords are `llama.Llama`'s."""
        pivot = {"pivot_layer": self.pivot_layer, "pivot_head": self.pivot_layer > 0}
        return llama.abstract(self.config, **pivot, **kwargs)


class Checkpoints:
    """The steps in a directory. Saving goes on in the background; a step appears when it is whole.

    Args: directory: made if missing; keep: how many of the latest steps stay (None: all).
    """

    def __init__(self, directory, keep: int | None = None):
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every file it touches
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        """The last whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, **items):
        """Starts saving `items` (trees of arrays, such as params= and opt_state=) as `step`."""
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, step: int, **items):
        """Reads items of `step` into the shapes, dtypes and shardings of the given abstract trees."""
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return tuple(restored[name] for name in items)

    def close(self):
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def describe(directory: Path, description: Description, tokenizer):
    """Writes what the checkpoints in `directory` are, and their tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory / "tokenizer", tokenizer.chat_template)
    description.write(directory)


def find(source) -> Path | None:
    """The checkpoint directory that `source` is, or holds as `checkpoints`; None if it is neither."""
    for directory in (Path(source), Path(source) / "checkpoints"):
        if (directory / DESCRIPTION).is_file():
            return directory
    return None


class CheckpointReader:
    """The latest step's parameters, behind the interface of `readers`.

    Raises:
      UserError: if there is no whole step.
    """

    def __init__(self, directory: Path):
        description = Description.read(directory)
        self.source, self.config, self.dtype = directory, description.config, np.dtype(description.dtype)
        self.pivot_layer, self.details = description.pivot_layer, description.details
        checkpoints = Checkpoints(directory)
        self.step = checkpoints.latest()
        if self.step is None:
            raise UserError(f"{directory} holds no whole checkpoint: train on, or give another source")
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = llama.to_params(description.abstract())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
        (self._params,) = checkpoints.restore(self.step, params=jax.tree.map(place, abstract))
        checkpoints.close()
        self._places = {name: (path, index) for name, path, index in hf_tensors(self._params)}
        self.names = set(self._places)

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor, by its Hugging Face name."""
        return self._tensor(name).shape

    def where(self, name) -> Path:
        """What holds a tensor."""
        return self.source / str(self.step)

    def read(self, name, index) -> np.ndarray:
        """A slice of a tensor."""
        return self._tensor(name)[index]

    def _tensor(self, name) -> np.ndarray:
        path, layer = (("pivot_head",), ()) if name == PIVOT_NAME else self._places[name]
        return np.asarray(functools.reduce(lambda node, key: node[key], path, self._params))[layer]


def placed(abstract: dict, mesh) -> dict:
    """Abstract parameters with the mesh's shardings."""

    def place(path, leaf):
        sharding = param_sharding(mesh, path_keys(path), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)
