"""Orbax's format, in and out, with all that is private of Orbax and TensorStore.

Orbax's pinned version has the interface that is to replace these (`orbax.checkpoint.v1`) as experimental
only. Until it is public, this file alone uses
  `ocp.type_handlers` (`NumpyHandler`, `ParamInfo`, `get_json_tspec_read`, `get_json_tspec_write`, a registry
    of its own): to write an array part by part that was never in memory whole, and to read a part of a stored
    one; Orbax itself takes and gives whole arrays or whole shards;
  `CheckpointManager._wait_for_checkpointers`: to know at once that a save has failed in this process.
"""

import collections
import contextlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import AbstractMesh

from prom_jax.checkpoints.description import DESCRIPTION, Description, describe
from prom_jax.checkpoints.params import LazyArray, head_tensor, hf_tensors, is_of_head
from prom_jax.checkpoints.storage import STORE_ERRORS, reason, reraise_storage_errors, resolve_path
from prom_jax.models import decoder
from prom_jax.models.lora import is_of_adapter
from prom_jax.parallel.sharding import AXES, param_sharding
from prom_jax.utils.errors import UserError

CHUNK_BYTES = 64 * 2**20  # the largest part of an array that is compressed, and thus read, as one
CACHE_BYTES = 256 * 2**20  # of decompressed chunks: a tensor is often read row by row
FILE_BYTES = 256 * 2**20  # TensorStore buffers a file before it writes it
PENDING = 2  # parts of a lazy array that are being written while the next is read


class Manager(ocp.CheckpointManager):
    """Keeps the error that ended this process's part of a save: Orbax raises it only after the others have
    ended theirs, and they wait for this one's."""

    failure: Exception | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise


def save_args(item):
    """How the arrays of a tree are cut: stacks by layer, so that a layer can be read without the others."""

    def args(x):
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())

    return jax.tree.map(args, item)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s part by part, so that no array is ever in memory; they restore as others do."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            # A part for each of eight devices: meshes up to that size read what they need and no more.
            mesh = AbstractMesh((1, 8, 1), AXES)
            shard = param_sharding(mesh, value.axes, value.shape).shard_shape(value.shape)
            chunk = (1, *shard[1:]) if len(shard) > 2 else shard
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=value.shape,
                local_shape=chunk,
                dtype=value.dtype,
                process_index=jax.process_index(),
            )
            store = await ts.open(ts.Spec(spec), create=True, context=info.ts_context)
            # A layer at a time, or a device's part of what has no layers.
            part = (1, *value.shape[1:]) if len(shard) > 2 else shard
            pending = collections.deque()
            for start in np.ndindex(*(size // of for size, of in zip(value.shape, part, strict=True))):
                index = tuple(slice(i * of, (i + 1) * of) for i, of in zip(start, part, strict=True))
                pending.append(store[index].write(value.read(index)))
                if len(pending) > PENDING:
                    await pending.popleft()
            for written in pending:
                await written
        return []


def write(directory, description: Description, model_tokenizer, params: dict):
    """Writes `LazyArray`s as the only step, 0, of a new checkpoint directory.

    Raises:
      UserError: if it cannot be written.
    """
    describe(directory, description, model_tokenizer)
    path = resolve_path(directory) / "0" / "params"
    args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
    options = {
        "options": ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        "item_handlers": {"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    }
    with reraise_storage_errors(path), ocp.CheckpointManager(resolve_path(directory), **options) as manager:
        manager.save(0, args=ocp.args.Composite(params=args))


class CheckpointReader:
    """A step's parameters with a reader's interface; of arrays, only the asked part is read.

    Args:
      place: as `find` gives it: a directory, of which the latest step is read, or one step of it.

    Raises:
      UserError: if there is no such whole step, or where it turns out to be damaged.
    """

    def __init__(self, place):
        place = resolve_path(place)
        directory = place if (place / DESCRIPTION).is_file() else place.parent
        description = Description.read(directory)
        self.source, self.config, self.dtype = directory, description.config, np.dtype(description.dtype)
        self.heads, self.details = description.heads, description.details
        self.lora, base = description.lora, description.base or {}
        self.base, self.fingerprint = base.get("source"), base.get("fingerprint")
        steps = ocp.utils.checkpoint_steps(directory)
        if not steps or (place != directory and int(place.name) not in steps):
            raise UserError(f"{place} holds no whole checkpoint: train on, or give another source")
        self.step = max(steps) if place == directory else int(place.name)
        exits = decoder.abstract(self.config, heads=self.heads, exits=description.exits).exits
        tensors = hf_tensors(self.config, exits, self.lora)
        self._paths = {
            name: (path, index) for name, path, index in tensors if not self.base or is_of_adapter(name)
        }
        self.names = {name for name in self._paths if not is_of_head(name)}
        low_rank = self.lora.heads if self.lora else ()
        self._paths |= {head_tensor(head): ((head,), ()) for head in self.heads if head not in low_rank}
        pools = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}, "cache_pool#ocdbt": {}}
        self._context, self._stores = ts.Context(pools), {}

    @property
    def tensors(self) -> set[str]:
        """Those of the adapter and of heads, as `adapter.AdapterReader` has them."""
        return {name for name in self._paths if is_of_adapter(name) or is_of_head(name)}

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor, by its Hugging Face name."""
        path, layer = self._paths[name]
        return self._store(path).shape[len(layer) :]

    def where(self, name) -> epath.Path:
        """What holds a tensor."""
        return self.source / str(self.step)

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor."""
        path, layer = self._paths[name]
        store = self._store(path)
        with self._naming_damage(name):
            return store[(*layer, *index)].read().result()

    def _store(self, path: tuple[str, ...]) -> ts.TensorStore:
        if path not in self._stores:
            name = ".".join(path)
            info = ocp.type_handlers.ParamInfo(
                name=name, parent_dir=self.where(name) / "params", ts_context=self._context
            )
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
            with self._naming_damage(name):
                self._stores[path] = ts.open(ts.Spec(spec), context=self._context).result()
        return self._stores[path]

    @contextlib.contextmanager
    def _naming_damage(self, name):
        try:
            yield
        except STORE_ERRORS as error:
            raise UserError(
                f"{self.where(name)} is damaged, {name} cannot be read ({reason(error)}): give another step "
                f"of {self.source}, or another source"
            ) from error
