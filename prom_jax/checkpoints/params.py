"""A model's parameters, between a reader and the devices."""

import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from prom_jax.checkpoints.reader import Reader
from prom_jax.models import decoder
from prom_jax.models.config import DecoderConfig
from prom_jax.models.lora import SCALES, LoRA, is_of_adapter, peft_names
from prom_jax.ops.quantised import codes_of, scales_of
from prom_jax.parallel.sharding import Axes, param_sharding, path_keys
from prom_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when its values are needed.

    Attributes:
      axes: the mesh axis of each of its last dimensions, as in `parallel.sharding.param_sharding`.
      read: gives a part of it, from an index of one slice an axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    read: Callable[[tuple[slice, ...]], np.ndarray]


def lazy_params(
    reader: Reader,
    *,
    heads: Mapping[str, int] | None = None,
    exits=(),
    dtype=None,
    lora: LoRA | None = None,
) -> dict:
    """A model's parameters as `LazyArray`s: their values are still where the reader has them.

    Args:
      reader: of the weights.
      heads, exits: as in `models.decoder.Decoder`. A further head is the one that is stored with the weights
        if there is one, otherwise a copy of lm_head (of the embedding where they are tied).
      dtype: of the parameters, default the source's.
      lora: as in `models.decoder.Decoder`; the reader then has the adapters' tensors too.

    Returns:
      A nested dict like that of `decoder.to_params`.

    Raises:
      UserError: if a tensor is missing, unknown, or not of the shape that the config gives it, or a head
        that is stored with the weights belongs to another layer.
    """
    dtype, heads = np.dtype(dtype or reader.dtype), heads or {}
    model = decoder.abstract(reader.config, heads=heads, exits=exits, param_dtype=dtype, lora=lora)
    params, axes = decoder.to_params(model), decoder.param_axes(reader.config, heads, lora)
    shapes = hf_shapes(reader.config, lora)
    sources = defaultdict(list)  # of each path its tensors in the order of layers
    for name, path, _ in hf_tensors(reader.config, model.exits, lora):
        sources[path].append(name)
    for head, layer in heads.items():
        name = _head_source(reader, head, layer)
        if head in params:  # one of low rank has its tensors among the adapters'
            sources[(head,)] = [name]
            shapes[name] = params[head].shape
    check_tensors(reader, shapes)

    def lazy(path, param):
        *stack, name = path_keys(path)
        names = sources[(*stack, name.removesuffix(SCALES))]
        read = functools.partial(_read_part, reader, names, param)
        if name.removesuffix(SCALES) + SCALES in axes:
            settings = {"kind": lora.quantised, "is_scales": name.endswith(SCALES)}
            read = functools.partial(_read_quantised, reader, names, param, **settings)
        return LazyArray(param.shape, param.dtype, axes[name], read)

    return jax.tree.map_with_path(lazy, params)


def load_params(reader: Reader, mesh=None, **settings) -> dict:
    """Reads a model's parameters, one after the other; each device's shard is read on its own.

    Args:
      reader: of the weights.
      mesh: of the parameters, None for one device.
      settings: of `lazy_params`.

    Returns:
      The nested dict of arrays that `decoder.with_params` takes.

    Raises:
      UserError: as `lazy_params`.
    """

    def load(param: LazyArray):
        one = SingleDeviceSharding(jax.devices()[0])
        sharding = param_sharding(mesh, param.axes, param.shape) if mesh else one
        return jax.make_array_from_callback(param.shape, sharding, param.read)

    return jax.tree.map(load, lazy_params(reader, **settings))


def abstract_params(model: decoder.Decoder, mesh) -> dict:
    """The parameters of an abstract model as shapes with the mesh's shardings."""
    axes = decoder.param_axes(model.config, model.heads, model.lora)

    def shard(path, leaf):
        sharding = param_sharding(mesh, axes[path[-1].key], leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shard, decoder.to_params(model))


def fingerprint(reader: Reader) -> str:
    """16 hexadecimal digits that change with the architecture or with the rows of any tensor that are read
    here, 16 spread over it, to tell one model's weights from another's without reading them all."""
    digest = hashlib.sha256(repr(reader.config).encode())
    for name in sorted(reader.names):
        rows, *others = reader.shape(name)
        some = np.unique(np.linspace(0, rows - 1, 16).astype(int)).tolist()
        for first in [slice(row, row + 1) for row in some] if others else [slice(None)]:
            part = reader.read(name, (first, *(slice(None) for _ in others)))
            digest.update(np.ascontiguousarray(part, np.float32).tobytes())
    return digest.hexdigest()[:16]


def hf_tensors(
    config: DecoderConfig, exits=(), lora: LoRA | None = None
) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Each Hugging Face tensor of a model cut into stacks at `exits`, and those of its adapters: its name,
    the path of our parameter, and the index of its layer in there. Further heads are not among them
    (`head_tensor`), but for those of low rank."""
    tensors = decoder.tensors(config, lora.heads if lora else (), lora)
    table = [row for row in tensors if not row.name.endswith(SCALES)]
    for row in (row for row in table if not row.in_layers):
        yield row.hf, (row.name,), ()
    for number, (first, last) in enumerate(decoder.stack_bounds(config.num_hidden_layers, exits)):
        for layer in range(first, last):
            for row in (row for row in table if row.in_layers):
                path = (decoder.stack_name(number), row.name)
                yield row.hf.format(layer=layer), path, (layer - first,)


def hf_shapes(config: DecoderConfig, lora: LoRA | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each Hugging Face tensor, and of those of adapters."""
    lora = dataclasses.replace(lora, quantised="") if lora else None  # no file has codes
    heads = dict.fromkeys(lora.heads if lora else ())
    params = decoder.to_params(decoder.abstract(config, heads=heads, lora=lora))
    return {
        name: at_path(params, path).shape[len(index) :] for name, path, index in hf_tensors(config, lora=lora)
    }


def head_tensor(head: str) -> str:
    """The name of a further head's tensor."""
    return f"{head}.weight"


def head_tensors(head: str) -> tuple[str, ...]:
    """The names of all tensors that a further head may have: its matrix, or a difference of low rank."""
    return (head_tensor(head), *peft_names(head_tensor(head)))


def is_of_head(name: str) -> bool:
    """Whether a tensor is one of a further head."""
    head = name.partition(".")[0]
    return head.endswith("_head") and head != "lm_head"


def main_head_tensor(config: DecoderConfig) -> str:
    """The name of the tensor that serves as the main head."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def at_path(params: dict, path: tuple[str, ...]):
    """The parameter at a path of a nested dict."""
    for key in path:
        params = params[key]
    return params


def _head_source(reader: Reader, head: str, layer: int) -> str:
    """The tensor that a further head, which reads after block `layer`, starts from."""
    if head not in reader.heads:
        return main_head_tensor(reader.config)
    if reader.heads[head] != layer:
        raise UserError(
            f"{reader.where(head_tensor(head))} was trained for layer {reader.heads[head]}, but pivot.layer "
            f"is {layer}: expected the same layer; delete the file to start from the main head"
        )
    return head_tensor(head)


def check_tensors(reader: Reader, shapes: Mapping[str, tuple[int, ...]]):
    """Raises UserError unless a reader has exactly these tensors, in these shapes."""
    held = reader.names | {name for head in reader.heads for name in head_tensors(head)}
    for part, remedy in _OTHER_NAMES.items():
        if found := sorted(name for name in reader.names - shapes.keys() if part in name):
            raise UserError(f"{reader.source} holds {_some(found)}: {remedy}")
    if shapes.keys() - held == {"lm_head.weight"}:
        raise UserError(
            f"{reader.source} lacks lm_head.weight, and its config.json does not say that the embedding "
            "serves as head: set `tie_word_embeddings` to true if that is so, or else fetch the model again"
        )
    if missing := sorted(shapes.keys() - held):
        raise UserError(
            f"{reader.source} lacks {_some(missing)}: expected all tensors of a model of "
            f"{reader.config.num_hidden_layers} layers; fetch it again"
        )
    if unknown := sorted(reader.names - shapes.keys()):
        raise UserError(
            f"{reader.source} holds {_some(unknown)}, unknown to this model: expected a plain "
            f"{reader.config.model_type!r} without adapters or quantised layers"
        )
    for name, shape in shapes.items():
        if (its := reader.shape(name)) != shape:
            raise UserError(
                f"{reader.where(name)}: {name} has the shape {list(its)}, the config says {list(shape)}: "
                "expected files of one model; fetch both again"
            )


# Parts of names that tell what has become of a model.
_OTHER_NAMES = {
    "_orig_mod.": "these are names of a compiled model; save `model._orig_mod` in place of it",
    "lora_": "these are an adapter's; merge it with peft's `merge_and_unload` and save the model again",
    "base_layer.": "an adapter was put around these; merge it with peft's `merge_and_unload` and save again",
}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_part(reader: Reader, names: list[str], param, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter, which stacks the tensors `names` or is the only one."""
    if len(param.shape) == len(reader.shape(names[0])):
        return _read_finite(reader, names[0], index).astype(param.dtype, copy=False)
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, param.shape, strict=True)]
    shard = np.empty(sizes, param.dtype)
    for layer, name in zip(shard, names[index[0]], strict=True):
        layer[...] = _read_finite(reader, name, index[1:])
    return shard


def _read_quantised(
    reader: Reader, names: list[str], param, index: tuple[slice, ...], *, kind: str, is_scales: bool
) -> np.ndarray:
    """A part of the codes, or scales, of a stack of matrices that are quantised as they are read: row by row,
    as a block of values may be in several parts."""
    *first, last = index
    layers = []
    for name in names[first[0]]:
        matrix = _read_finite(reader, name, (*first[1:], slice(None)))
        layers.append((scales_of if is_scales else codes_of)(matrix, kind)[..., last])
    return np.stack(layers).astype(param.dtype, copy=False)


def _read_finite(reader: Reader, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor; raises UserError if it is not all numbers, of which nothing could be computed."""
    part = reader.read(name, index)
    if not np.isfinite(part).all():
        bad = part[~np.isfinite(part)]
        raise UserError(
            f"{reader.where(name)}: {name} has {bad.size} values that are no finite numbers, such as "
            f"{bad.flat[0]}: the model itself is damaged; fetch it again, or take another one"
        )
    return part


class ParamsReader:
    """Parameters on devices with a reader's interface; all processes must read the same parts.

    Args:
      model: with its parameters.
    """

    def __init__(self, model: decoder.Decoder):
        self.source: Path | str = "the model"
        self.config, self.details, self.heads = model.config, {}, model.heads
        self._params = decoder.to_params(model)
        self.dtype = np.dtype(self._params["embed_tokens"].dtype)
        self.lora = model.lora
        tensors = hf_tensors(model.config, model.exits, model.lora)
        self._paths = {name: (path, index) for name, path, index in tensors}
        self.names = {name for name in self._paths if not is_of_head(name)}
        self._paths |= {head_tensor(head): ((head,), ()) for head in self.heads if head in self._params}

    @property
    def tensors(self) -> set[str]:
        """Those of adapters and of heads, as `adapter.AdapterReader` has them."""
        return {name for name in self._paths if is_of_adapter(name) or is_of_head(name)}

    def shape(self, name) -> tuple[int, ...]:
        """Of a tensor, by its Hugging Face name."""
        path, layer = self._paths[name]
        return at_path(self._params, path).shape[len(layer) :]

    def where(self, name) -> Path | str:
        """What holds a tensor."""
        return self.source

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor, gathered from the devices of all processes."""
        path, layer = self._paths[name]
        part = at_path(self._params, path)[(*layer, *index)]
        if not part.is_fully_addressable:
            part = multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)
