"""A model's parameters, between a reader and the devices."""

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from prom_jax.checkpoints.names import PIVOT_NAME, TENSORS
from prom_jax.checkpoints.reader import Reader
from prom_jax.models import decoder as llama
from prom_jax.models.config import LlamaConfig
from prom_jax.parallel.sharding import param_sharding, path_keys
from prom_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when its values are needed: `read` gives a part, `index` one slice an axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]


def lazy_params(reader: Reader, *, pivot_layer: int = 0, pivot_head: bool = False, dtype=None) -> dict:
    """A model's parameters as `LazyArray`s: their values are still where the reader has them.

    Args:
      reader: where from.
      pivot_layer: n, where the blocks are split into two stacks; 0 for one stack.
      pivot_head: whether to have one: that of the source if it has one, otherwise a copy of lm_head
        (of the embedding where they are tied).
      dtype: of the parameters, default the source's.
    Returns:
      A nested dict like that of `llama.to_params`.
    Raises:
      UserError: if a tensor is missing, unknown, or not of the shape that the config gives it, or the
        source's pivot head belongs to another layer.
    """
    dtype = np.dtype(dtype or reader.dtype)
    params = llama.to_params(
        llama.abstract(reader.config, pivot_layer=pivot_layer, pivot_head=pivot_head, param_dtype=dtype)
    )
    shapes = hf_shapes(params)
    sources = defaultdict(list)  # of each path its tensors in the order of layers
    for name, path, _ in hf_tensors(params):
        sources[path].append(name)
    if pivot_head:
        name = _pivot_source(reader, pivot_layer)
        sources[("pivot_head",)] = [name]
        shapes[name] = params["pivot_head"].shape
    check_tensors(reader, shapes)

    def lazy(path, param):
        read = functools.partial(_read_part, reader, sources[path_keys(path)], param)
        return LazyArray(param.shape, dtype, read)

    return jax.tree.map_with_path(lazy, params)


def load_params(reader: Reader, mesh=None, **settings) -> dict:
    """Reads a model's parameters, one after the other; each device's shard is read on its own.

    Args:
      reader: where from.
      mesh: where to, None for one device.
      settings: of `lazy_params`.
    Returns:
      The nested dict of arrays that `llama.with_params` takes.
    Raises:
      UserError: as `lazy_params`.
    """

    def load(path, param):
        one = SingleDeviceSharding(jax.devices()[0])
        sharding = param_sharding(mesh, path_keys(path), param.shape) if mesh else one
        return jax.make_array_from_callback(param.shape, sharding, param.read)

    return jax.tree.map_with_path(load, lazy_params(reader, **settings))


def placed(abstract: dict, mesh) -> dict:
    """Abstract parameters with the mesh's shardings."""

    def place(path, leaf):
        sharding = param_sharding(mesh, path_keys(path), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)


def fingerprint(reader: Reader) -> str:
    """16 hexadecimal digits that change with the architecture or with the rows of any tensor that are read
    here, 16 spread over it, to tell one model's weights from another's without reading them all."""
    digest = hashlib.sha256(repr(reader.config).encode())
    for name in sorted(reader.names):
        rows, *others = reader.shape(name)
        for row in np.unique(np.linspace(0, rows - 1, 16).astype(int)).tolist() if others else [None]:
            first = slice(row, row + 1) if others else slice(None)
            part = reader.read(name, (first, *(slice(None) for _ in others)))
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()[:16]


def hf_tensors(params: dict) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Each Hugging Face tensor: its name, the path of our parameter, and the index of its layer in there."""
    for ours, name, _ in TENSORS:
        if ours in params:
            yield name, (ours,), ()
    stacks = [stack for stack in ("lower", "upper") if stack in params]
    layers = [(stack, i) for stack in stacks for i in range(params[stack]["q_proj"].shape[0])]
    for layer, (stack, i) in enumerate(layers):
        for ours, name, _ in TENSORS:
            if ours in params[stack]:
                yield name.format(layer=layer), (stack, ours), (i,)


def hf_shapes(params: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each Hugging Face tensor."""
    return {name: at_path(params, path).shape[len(index) :] for name, path, index in hf_tensors(params)}


def at_path(params: dict, path: tuple[str, ...]):
    for key in path:
        params = params[key]
    return params


def _pivot_source(reader: Reader, pivot_layer: int) -> str:
    """The tensor that a pivot head after block `pivot_layer` starts from."""
    if not reader.pivot_layer:
        tied = reader.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"
    if reader.pivot_layer != pivot_layer:
        raise UserError(
            f"{reader.where(PIVOT_NAME)} was trained for layer {reader.pivot_layer}, but pivot.layer is "
            f"{pivot_layer}: expected the same layer; delete the file to start from the main head"
        )
    return PIVOT_NAME


def check_tensors(reader: Reader, shapes: Mapping[str, tuple[int, ...]]):
    held = reader.names | ({PIVOT_NAME} if reader.pivot_layer else set())
    if missing := sorted(shapes.keys() - held):
        raise UserError(
            f"{reader.source} lacks {_some(missing)}: expected all tensors of a model of "
            f"{reader.config.num_hidden_layers} layers; fetch it again"
        )
    if unknown := sorted(reader.names - shapes.keys()):
        raise UserError(
            f"{reader.source} holds {_some(unknown)}, unknown to this model: expected a plain Llama or "
            "Mistral without biases, adapters or quantised layers"
        )
    for name, shape in shapes.items():
        if (found := reader.shape(name)) != shape:
            raise UserError(
                f"{reader.where(name)}: {name} has the shape {list(found)}, the config says {list(shape)}: "
                "expected files of one model; fetch both again"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_part(reader: Reader, names: list[str], param, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter, which stacks the tensors `names` or is the only one."""
    if len(param.shape) == len(reader.shape(names[0])):
        return reader.read(names[0], index).astype(param.dtype, copy=False)
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, param.shape, strict=True)]
    shard = np.empty(sizes, param.dtype)
    for layer, name in zip(shard, names[index[0]], strict=True):
        layer[...] = reader.read(name, index[1:])
    return shard


class ParamsReader:
    """Parameters on devices behind a reader's interface; all processes must read the same parts.

    Args:
      params: nested dict of arrays, as `llama.to_params` gives it.
      config: of the model.
    """

    def __init__(self, params: dict, config: LlamaConfig):
        self.source, self.config, self.details = "the model", config, {}
        self.pivot_layer = params["lower"]["q_proj"].shape[0] if "pivot_head" in params else 0
        self.dtype = np.dtype(params["embed_tokens"].dtype)
        places = {name: (path, index) for name, path, index in hf_tensors(params)}
        self.names = set(places)
        self._params, self._places = params, places | {PIVOT_NAME: (("pivot_head",), ())}

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor, by its Hugging Face name."""
        path, layer = self._places[name]
        return at_path(self._params, path).shape[len(layer) :]

    def where(self, name) -> str:
        """What holds a tensor."""
        return self.source

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor, gathered from the devices of all processes."""
        path, layer = self._places[name]
        part = at_path(self._params, path)[(*layer, *index)]
        if not part.is_fully_addressable:
            part = multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)
