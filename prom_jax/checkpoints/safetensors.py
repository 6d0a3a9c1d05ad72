"""Weights in and out: from a reader into the model's shards, and out as a Hugging Face directory."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from transformers import PreTrainedTokenizerFast

from prom_jax.checkpoints.reader import DETAILS_KEY, PIVOT_FILE, PIVOT_NAME, TENSORS
from prom_jax.models import decoder as llama
from prom_jax.models.config import LlamaConfig
from prom_jax.parallel.multihost import is_first
from prom_jax.parallel.sharding import param_sharding, path_keys
from prom_jax.tokenization import auto as tokenizer
from prom_jax.utils.errors import UserError

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ADAPTED = (
    "A language model adapted to another language by instruction tuning with prom_jax.\n"
    "Prompts follow the chat template of its tokenizer."
)
CONVERTED = "A language model converted by prom_jax."
_CARD_TAG = "- prom_jax"  # in its model card marks a folder as an export, which the next may replace


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when its values are needed: `read` gives a part, `index` one slice an axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]


def lazy_params(reader, *, pivot_layer: int = 0, pivot_head: bool = False, dtype=None) -> dict:
    """A model's parameters as `LazyArray`s: their values are still where the reader has them.

    Args:
      reader: where from, see `readers`.
      pivot_layer: n, where the blocks are split into two stacks; 0 for one stack.
      pivot_head: whether to have one: that beside the weights if there is one, otherwise a copy of lm_head
        (of the embedding where they are tied).
      dtype: of the parameters, default the source's.
    Returns: a nested dict like that of `llama.to_params`.
    Raises:
      UserError: if a tensor is missing, unknown, or not of the shape that the config gives it, or the pivot
        head beside the weights belongs to another layer.
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
    _check_tensors(reader, shapes)

    def lazy(path, param):
        read = functools.partial(_read_part, reader, sources[path_keys(path)], param)
        return LazyArray(param.shape, dtype, read)

    return jax.tree.map_with_path(lazy, params)


def load_params(reader, mesh=None, **settings) -> dict:
    """Reads a model's parameters, one after the other; each device's shard is read on its own.

    Args: reader: where from, see `readers`; mesh: where to, None for one device; settings: of `lazy_params`.
    Returns: the nested dict of arrays that `llama.with_params` takes.
    Raises:
      UserError: as `lazy_params`.
    """

    def load(path, param):
        one = SingleDeviceSharding(jax.devices()[0])
        sharding = param_sharding(mesh, path_keys(path), param.shape) if mesh else one
        return jax.make_array_from_callback(param.shape, sharding, param.read)

    return jax.tree.map_with_path(load, lazy_params(reader, **settings))


def fingerprint(reader) -> str:
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
    return {name: _at(params, path).shape[len(index) :] for name, path, index in hf_tensors(params)}


def _at(params: dict, path: tuple[str, ...]):
    for key in path:
        params = params[key]
    return params


def _pivot_source(reader, pivot_layer: int) -> str:
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


def _check_tensors(reader, shapes: Mapping[str, tuple[int, ...]]):
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


def _read_part(reader, names: list[str], param, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a parameter, which stacks the tensors `names` or is the only one."""
    if len(param.shape) == len(reader.shape(names[0])):
        return reader.read(names[0], index).astype(param.dtype, copy=False)
    sizes = [len(range(*part.indices(size))) for part, size in zip(index, param.shape, strict=True)]
    shard = np.empty(sizes, param.dtype)
    for layer, name in zip(shard, names[index[0]], strict=True):
        layer[...] = reader.read(name, index[1:])
    return shard


class ParamsReader:
    """Parameters on devices behind the interface of `readers`; all processes must read the same parts.

    Args: params: nested dict of arrays, as `llama.to_params` gives it; config: of the model.
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
        return _at(self._params, path).shape[len(layer) :]

    def where(self, name) -> str:
        """What holds a tensor."""
        return self.source

    def read(self, name, index) -> np.ndarray:
        """A part of a tensor, gathered from the devices of all processes."""
        path, layer = self._places[name]
        part = _at(self._params, path)[(*layer, *index)]
        if not part.is_fully_addressable:
            part = multihost_utils.process_allgather(part, tiled=True)
        return np.asarray(part)


def save_hf(
    reader,
    model_tokenizer: PreTrainedTokenizerFast,
    directory,
    *,
    dtype,
    chat_template: str | None,
    card: Mapping[str, object],
    max_shard_bytes: int = 5 * 10**9,
):
    """Writes a Hugging Face directory that transformers loads as it is. All processes must call it.

    The folder appears whole or not at all; an earlier export of the same name is replaced. A pivot head goes
    into a file of its own, which transformers ignores. One tensor at a time is held in host memory.

    Args:
      reader: of the model, see `readers`; `ParamsReader` for one in memory.
      model_tokenizer: its tokenizer; its EOS token ends generation.
      directory: to write.
      dtype: of the written tensors: float32, float16 or bfloat16, by name or as a numpy dtype.
      chat_template: jinja, of the prompts that the model was trained on.
      card: what the model card says: 'base_model', 'language', 'method' and any settings; `config.json` keeps
        it for programs.
      max_shard_bytes: size of a safetensors file beyond which another one is begun.
    Raises:
      UserError: for another dtype, if the reader's tensors are not those of its config, or if the directory
        holds something else or cannot be written.
    """
    if str(dtype) not in _SAFETENSORS_DTYPES:
        raise UserError(f"export.dtype={str(dtype)!r}: expected one of {', '.join(_SAFETENSORS_DTYPES)}")
    directory, dtype, card = Path(directory).resolve(), np.dtype(dtype), _public(card)
    shapes = hf_shapes(llama.to_params(llama.abstract(reader.config)))
    _check_tensors(reader, shapes)
    partial = directory.with_name(f".{directory.name}.partial")
    writer = is_first()
    try:
        if writer:
            _prepare(directory, partial, dtype.itemsize * sum(map(math.prod, shapes.values())))
            _write_small_files(partial, reader.config, dtype, model_tokenizer, chat_template, card)
        shards = _split(shapes, dtype, max_shard_bytes)
        for file_name, names in shards.items():
            path = partial / file_name if writer else os.devnull
            _write_safetensors(path, reader, names, dtype, {"format": "pt"})
        if reader.pivot_layer:
            path = partial / PIVOT_FILE if writer else os.devnull
            metadata = {"format": "pt", "pivot_layer": str(reader.pivot_layer)}
            _write_safetensors(path, reader, [PIVOT_NAME], dtype, metadata)
        if writer:
            if len(shards) > 1:
                _write_index(partial, shards, shapes, dtype)
            _replace(directory, partial)
    except OSError as error:
        raise UserError(
            f"{directory} could not be written ({error}): make room or choose another place; "
            "nothing was left there"
        ) from error
    finally:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")


def _prepare(directory: Path, partial: Path, num_bytes: int):
    """Makes the folder to write in, having made sure that it can take its place and that it fits."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: expected a directory; choose another place")
    card = directory / "README.md"
    ours = card.exists() and _CARD_TAG in card.read_text(encoding="utf-8", errors="replace").splitlines()
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
            "make room or choose another place"
        )


def _replace(directory: Path, partial: Path):
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _split(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, max_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, under Hugging Face's names for one or many."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_index(directory: Path, shards: dict[str, list[str]], shapes: Mapping, dtype: np.dtype):
    total = sum(map(math.prod, shapes.values()))
    index = {
        "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
        "weight_map": {name: file_name for file_name, names in shards.items() for name in names},
    }
    _write_json(directory / "model.safetensors.index.json", index)


def _write_safetensors(path, reader, names: list[str], dtype: np.dtype, metadata: dict[str, str]):
    """Writes tensors one by one: the safetensors library would want all those of a file in memory.

    The format: the header's length (8 bytes, little-endian), the header (JSON), the values in its order.
    """
    header, start = {"__metadata__": metadata}, 0
    for name in names:
        end = start + math.prod(reader.shape(name)) * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype.name],
            "shape": list(reader.shape(name)),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            whole = reader.read(name, (slice(None),) * len(reader.shape(name)))
            file.write(np.ascontiguousarray(whole, dtype).view(np.uint8).data)


def _write_small_files(
    directory: Path,
    config: LlamaConfig,
    dtype: np.dtype,
    model_tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
    card: Mapping[str, object],
):
    details = {DETAILS_KEY: card} if card else {}
    _write_json(directory / "config.json", {**config.to_hf(), "torch_dtype": dtype.name, **details})
    of_config = config.eos_token_id
    eos = [model_tokenizer.eos_token_id, *(of_config if isinstance(of_config, tuple) else (of_config,))]
    eos = list(dict.fromkeys(token for token in eos if token is not None))
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }
    generation = {key: value for key, value in generation.items() if value is not None}
    _write_json(directory / "generation_config.json", generation)
    tokenizer.save(model_tokenizer, directory, chat_template)
    (directory / "README.md").write_text(_model_card(card), encoding="utf-8")


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _public(card: Mapping[str, object]) -> dict:
    """A model card whose base model is no place on this machine, which says nothing to others."""
    base = str(card.get("base_model", ""))
    return {**card, "base_model": Path(base).name} if base and Path(base).exists() else dict(card)


def _model_card(card: Mapping[str, object]) -> str:
    base = str(card.get("base_model", ""))
    front = {"base_model": base if "/" in base else "", "language": card.get("language", "")}
    front = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    rows = [f"| {key} | {value} |" for key, value in card.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            _CARD_TAG,
            *front,
            "---",
            "",
            "# Model card",
            "",
            ADAPTED if "method" in card else CONVERTED,
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )
