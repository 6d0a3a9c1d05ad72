"""Orbax checkpoints: the training state of some steps, and beside them what the model is.

    checkpoints/
      model.json     architecture, pivot layer, dtype of the source, how it was made
      tokenizer/     as Hugging Face saves it
      <step>/        params and, for training, optimizer state and their checksums

The data position is the step number, so there is nothing else to keep. A directory may be a path or a place
in an object store, gs://bucket/….
"""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.sharding import AbstractMesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from prom_jax.checkpoints.reader import PIVOT_NAME
from prom_jax.checkpoints.safetensors import LazyArray, hf_tensors
from prom_jax.models import decoder as llama
from prom_jax.models.config import LlamaConfig
from prom_jax.parallel.multihost import is_first
from prom_jax.parallel.sharding import AXES, param_sharding, path_keys
from prom_jax.tokenization import auto as tokenizer
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError

DESCRIPTION, TOKENIZER, CHECKSUMS = "model.json", "tokenizer", "checksums"
CHUNK_BYTES = 64 * 2**20  # the largest part of an array that is compressed, and thus read, as one
CACHE_BYTES = 256 * 2**20  # of decompressed chunks: a tensor is often read row by row
FILE_BYTES = 256 * 2**20  # TensorStore buffers a file before it writes it
PENDING = 2  # parts of a lazy array that are being written while the next is read
# What Orbax, TensorStore and the system raise where files cannot be read or written. What an object store's
# clients raise has no kind in common, so that they are caught as `Exception`.
STORE_ERRORS = (OSError, ValueError, KeyError, TypeError)
REMOTE = "gs://"


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

    def write(self, directory):
        """Writes `model.json`."""
        fields = dataclasses.asdict(self) | {"config": self.config.to_hf()}
        (located(directory) / DESCRIPTION).write_text(json.dumps(fields, indent=2, ensure_ascii=False))

    @classmethod
    def read(cls, directory) -> "Description":
        """Reads `model.json`.

        Raises:
          UserError: if it is damaged.
        """
        path = located(directory) / DESCRIPTION
        try:
            fields = json.loads(path.read_text())
            for name, kind in (("config", dict), ("pivot_layer", int), ("dtype", str), ("details", dict)):
                if not isinstance(fields[name], kind):
                    raise TypeError(f"{name} is {fields[name]!r:.100}")
            if not jnp.issubdtype(np.dtype(fields["dtype"]), jnp.floating):
                raise TypeError(f"dtype is {fields['dtype']!r:.100}")
            return cls(**fields | {"config": LlamaConfig.from_hf(fields["config"])})
        except (*STORE_ERRORS, RecursionError) as error:
            raise UserError(f"{path} is damaged ({_reason(error)}): give another source") from error

    def abstract(self, **kwargs) -> llama.Llama:
        """The model in shapes; the keywords are `llama.Llama`'s."""
        pivot = {"pivot_layer": self.pivot_layer, "pivot_head": self.pivot_layer > 0}
        return llama.abstract(self.config, **pivot, **kwargs)


class Checkpoints:
    """The steps in a directory. Saving goes on in the background; a step appears when it is whole.

    Args:
      directory: made if missing.
      keep: how many of the latest steps stay (None: all).
      keep_best: how many of those with the lowest held-out loss stay besides.
      keep_every: steps that are multiples of it stay besides; 0: none.
    Raises:
      UserError: if the directory cannot be made or read.
    """

    def __init__(self, directory, keep: int | None = None, keep_best: int = 0, keep_every: int = 0):
        _quiet()
        self.directory = located(directory)
        policies = [LatestN(keep)]
        if keep_best:
            best = {"get_metric_fn": lambda metrics: metrics["loss"], "reverse": True}
            policies.append(BestN(n=keep_best, keep_checkpoints_without_metrics=False, **best))
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        self._policy = AnyPreservationPolicy(policies)
        self._step, self._failure = 0, ""  # what is being saved; why the last save failed
        self._open()

    def _open(self):
        remote = _is_remote(self.directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not remote,  # there it would remove every folder but the steps
        )
        with usable(self.directory):
            self._manager = _Manager(self.directory, options=options)
            if remote and is_first() and self.directory.exists():
                whole = set(map(str, self._manager.all_steps()))
                for place in self.directory.iterdir():
                    if place.name.isdecimal() and place.name not in whole:
                        place.rmtree()

    def latest(self) -> int | None:
        """The last whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, loss: float | None = None, **items):
        """Starts saving `items` (trees of arrays, such as params= and opt_state=) as `step`.

        If the save before failed, or this one cannot begin, a warning says so and the caller goes on:
        earlier steps are whole, and the next save tries again.

        Args: loss: held-out, by which the best steps are told.
        Raises:
          UserError: with several processes, if a save failed.
        """
        self._finish()
        self._failure = ""
        args = {name: ocp.args.PyTreeSave(item, _storage(item), FILE_BYTES) for name, item in items.items()}
        args[CHECKSUMS] = ocp.args.JsonSave(checksums(items))
        metrics = None if loss is None else {"loss": float(loss)}
        self._step = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
        except _errors(self.directory) as error:
            self._failed(error)

    def resume(self, **items):
        """Reads the last step that is whole; damaged ones are named and put aside as `<step>.damaged`.

        Args: items: abstract trees, whose shapes, dtypes and shardings the results have.
        Returns: the step and the items, a tuple in their order; 0 and None where there is no whole step.
        Raises:
          UserError: with several processes, for a damaged step: run again to go on from the one before; if
            the directory cannot be read at all.
        """
        with usable(self.directory):
            while step := self.latest():
                try:
                    restored = self.restore(step, **items)
                except STORE_ERRORS as error:
                    self._put_aside(step, error)
                else:
                    console.print(f"resumed   after step {step}")
                    return step, restored
        return 0, None

    def restore(self, step: int, **items) -> tuple:
        """Reads items of `step` into the shapes, dtypes and shardings of the given abstract trees.

        Raises:
          ValueError, OSError, KeyError, TypeError: where the step is damaged.
        """
        args = {
            name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
            for name, item in items.items()
        }
        args[CHECKSUMS] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        for name, found in checksums({name: restored[name] for name in items}).items():
            if restored[CHECKSUMS][name] != found:
                raise ValueError(f"the values of {name} are not those that were saved")
        return tuple(restored[name] for name in items)

    def close(self):
        """Waits until everything is written.

        Raises:
          UserError: if the last save failed.
        """
        self._finish()
        self._manager.close()
        if self._failure:
            raise UserError(self._failure)

    def _finish(self):
        try:
            while jax.process_count() > 1 and self._manager.is_saving_in_progress():
                if self._manager.failure:
                    raise self._manager.failure
                time.sleep(0.05)
            self._manager.wait_until_finished()
        except _errors(self.directory) as error:
            self._failed(error)

    def _failed(self, error: Exception):
        told = (
            f"{self.directory}: step {self._step} could not be saved ({_reason(error)}): make room or choose "
            "another checkpoint.directory"
        )
        if jax.process_count() > 1:  # the others wait for this one's part of the step
            raise UserError(told) from error
        self._failure = told
        with contextlib.suppress(*_errors(self.directory)):  # it tells of the same again
            self._manager.close()
        with contextlib.suppress(UserError):  # an object store may be out of reach for longer
            self._open()  # forgets the step, and removes what there is of it
            self._failure += f"; the last whole step is {self.latest() or 'none'}"
        console.print(f"WARNING   {self._failure}")

    def _put_aside(self, step: int, error: Exception):
        place, aside = self.directory / str(step), self.directory / f"{step}.damaged"
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process may be first
            if place.exists() and aside.exists():
                aside.rmtree()
            place.rename(aside)
        told = f"{self.directory}: step {step} is damaged ({_reason(error)}), it is now {aside.name}"
        if jax.process_count() > 1:  # the others may have read their parts of it
            raise UserError(f"{told}: run the same command to go on from the step before") from error
        self._manager.close()
        self._open()
        console.print(f"WARNING   {told}; going on from step {self.latest() or 'none'}")


class _Manager(ocp.CheckpointManager):
    """Keeps at hand why the writing of this process's part has failed: Orbax tells only after the others have
    ended theirs, and they wait for this one's."""

    failure: Exception | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise


def _quiet():
    """Orbax tells of every file it touches; it and gcsfs print the trace of each error that they raise, and
    TensorStore one for each part of an array whose writing nobody waits for any more."""
    for library in ("absl", "gcsfs", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _tell_unraisable


def _tell_unraisable(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_remote(place) -> bool:
    """Whether a place is in an object store."""
    return str(place).startswith(REMOTE)


def _errors(directory):
    """What tells that a directory, which may be in an object store, cannot be used."""
    return (Exception,) if _is_remote(directory) else STORE_ERRORS


@contextlib.contextmanager
def usable(directory):
    """Raises UserError where the block finds that a directory cannot be made, read or written."""
    try:
        yield
    except UserError:
        raise
    except _errors(directory) as error:
        remedy = "make room or choose another place"
        if _is_remote(directory):
            remedy = (
                "see that the bucket is there and open to you, log in with "
                "`gcloud auth application-default login`, or choose another place"
            )
        raise UserError(f"{directory} cannot be used ({_reason(error)}): {remedy}") from error


def _reason(error: Exception) -> str:
    """The gist of an error: TensorStore's tell of every layer, the system's word is in them somewhere."""
    if code := re.search(r"os_error_code='(\d+)'|\[Errno (\d+)\]", str(error)):
        return os.strerror(int(code[1] or code[2]))
    missing = "not found: " * isinstance(error, FileNotFoundError)  # gcsfs tells the address alone
    return missing + next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _storage(item):
    """How the arrays of a tree are cut: stacks by layer, so that a layer can be read without the others."""
    args = lambda x: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())
    return jax.tree.map(args, item)


def checksums(tree) -> dict[str, int]:
    """The sum of each array's bits, as unsigned integers modulo 2³², by its place in the tree: the same on
    every mesh, and another one if a bit has changed."""
    sums = jax.device_get(_sums(tree))
    return {jax.tree_util.keystr(path): int(x) for path, x in jax.tree.leaves_with_path(sums)}


@jax.jit
def _sums(tree):
    def bits(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes `LazyArray`s part by part, so that no array is ever in memory; they restore as others do."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            # A part for each of eight devices: meshes up to that size read what they need and no more.
            mesh = AbstractMesh((1, 8, 1), AXES)
            shard = param_sharding(mesh, tuple(info.name.split(".")), value.shape).shard_shape(value.shape)
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
    _quiet()
    describe(directory, description, model_tokenizer)
    path = located(directory) / "0" / "params"
    args = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
    options = {
        "options": ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        "item_handlers": {"params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)},
    }
    with usable(path), ocp.CheckpointManager(located(directory), **options) as manager:
        manager.save(0, args=ocp.args.Composite(params=args))


def describe(directory, description: Description, model_tokenizer):
    """Writes what the checkpoints in `directory` are, and their tokenizer; process 0 does.

    Raises:
      UserError: if they cannot be written.
    """
    if not is_first():
        return
    directory = located(directory)
    with usable(directory), tempfile.TemporaryDirectory() as local:
        (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
        tokenizer.save(model_tokenizer, Path(local), model_tokenizer.chat_template)
        for path in Path(local).iterdir():
            (directory / TOKENIZER / path.name).write_bytes(path.read_bytes())
    description.write(directory)


def load_tokenizer(directory):
    """The tokenizer beside the checkpoints in `directory`."""
    with tempfile.TemporaryDirectory() as local:
        for path in (located(directory) / TOKENIZER).iterdir():
            (Path(local) / path.name).write_bytes(path.read_bytes())
        return tokenizer.load(local)


def located(path) -> epath.Path:
    """A place on this machine, made absolute, or in an object store.

    Raises:
      UserError: for an object store that is not supported, or for which a package is missing.
    """
    scheme = re.match(r"\w+://", str(path))
    if not scheme:
        return epath.Path(os.path.abspath(path))
    if scheme[0] != REMOTE:
        raise UserError(f"{path} is in no place that is supported: expected a path or gs://bucket/…")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs the package gcsfs: pip install -e '.[gcs]'")
    return epath.Path(path)


def find(source) -> epath.Path | None:
    """The checkpoint directory that `source` is or holds as `checkpoints`, or the one step that it is; None
    if it is none of these.

    Raises:
      UserError: if it is a place in an object store that is none of these or cannot be read.
    """
    place = located(source)
    _quiet()
    with usable(place):
        for directory in (place, place / "checkpoints"):
            if (directory / DESCRIPTION).is_file():
                return directory
        if place.name.isdecimal() and (place.parent / DESCRIPTION).is_file():
            return place
    if _is_remote(place):
        raise UserError(
            f"{place} holds no checkpoint, or its bucket is not there: expected one that prom_jax wrote; "
            "other models must lie on this machine"
        )
    return None


class CheckpointReader:
    """A step's parameters, behind the interface of `readers`; of arrays, only the asked part is read.

    Args: place: as `find` gives it: a directory, of which the latest step is read, or one step of it.
    Raises:
      UserError: if there is no such whole step, or where it turns out to be damaged.
    """

    def __init__(self, place):
        place = located(place)
        directory = place if (place / DESCRIPTION).is_file() else place.parent
        description = Description.read(directory)
        self.source, self.config, self.dtype = directory, description.config, np.dtype(description.dtype)
        self.pivot_layer, self.details = description.pivot_layer, description.details
        steps = ocp.utils.checkpoint_steps(directory)
        if not steps or (place != directory and int(place.name) not in steps):
            raise UserError(f"{place} holds no whole checkpoint: train on, or give another source")
        self.step = max(steps) if place == directory else int(place.name)
        params = llama.to_params(description.abstract())
        self._places = {name: (path, index) for name, path, index in hf_tensors(params)}
        self.names = set(self._places)
        pools = {"cache_pool": {"total_bytes_limit": CACHE_BYTES}, "cache_pool#ocdbt": {}}
        self._context, self._stores = ts.Context(pools), {}

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor, by its Hugging Face name."""
        path, layer = self._place(name)
        return self._store(path).shape[len(layer) :]

    def where(self, name) -> epath.Path:
        """What holds a tensor."""
        return self.source / str(self.step)

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor."""
        path, layer = self._place(name)
        store = self._store(path)
        with self._naming_damage(name):
            return store[(*layer, *index)].read().result()

    def _place(self, name):
        return (("pivot_head",), ()) if name == PIVOT_NAME else self._places[name]

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
                f"{self.where(name)} is damaged, {name} cannot be read ({_reason(error)}): give another step "
                f"of {self.source}, or another source"
            ) from error


def placed(abstract: dict, mesh) -> dict:
    """Abstract parameters with the mesh's shardings."""

    def place(path, leaf):
        sharding = param_sharding(mesh, path_keys(path), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)
