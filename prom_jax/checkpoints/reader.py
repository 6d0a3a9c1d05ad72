"""Where weights come from: a Hugging Face directory of safetensors or a GGUF file, behind one interface.

A reader has
  `source`       the path it reads,
  `config`       its LlamaConfig,
  `dtype`        the dtype that holds its tensors, float32 where they are quantised,
  `pivot_layer`  the layer of the pivot head that lies beside the weights, 0 if none does,
  `details`      how the model was made, as its model card tells it; {} if it was not made here,
  `names`        the set of its tensors, by their Hugging Face names,
  `shape(name)`, `where(name)`  a tensor's shape and the file it is in,
  `read(name, index)`  a part of a tensor, `index` one slice an axis; no other part is read or dequantised.
"""

import dataclasses
import functools
import json
import os
import re
import sys
from pathlib import Path

import gguf
import huggingface_hub
import jax.numpy as jnp
import numpy as np
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError, safe_open

from prom_jax.models.config import LlamaConfig, RopeScaling
from prom_jax.models.decoder import rope_frequencies
from prom_jax.utils.errors import UserError

# Every tensor by its three names: ours, Hugging Face's, GGUF's. Those with a layer lie stacked in ours.
TENSORS = (
    ("embed_tokens", "model.embed_tokens.weight", "token_embd.weight"),
    ("input_layernorm", "model.layers.{layer}.input_layernorm.weight", "blk.{layer}.attn_norm.weight"),
    ("q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "blk.{layer}.attn_q.weight"),
    ("k_proj", "model.layers.{layer}.self_attn.k_proj.weight", "blk.{layer}.attn_k.weight"),
    ("v_proj", "model.layers.{layer}.self_attn.v_proj.weight", "blk.{layer}.attn_v.weight"),
    ("o_proj", "model.layers.{layer}.self_attn.o_proj.weight", "blk.{layer}.attn_output.weight"),
    (
        "post_attention_layernorm",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "blk.{layer}.ffn_norm.weight",
    ),
    ("gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "blk.{layer}.ffn_gate.weight"),
    ("up_proj", "model.layers.{layer}.mlp.up_proj.weight", "blk.{layer}.ffn_up.weight"),
    ("down_proj", "model.layers.{layer}.mlp.down_proj.weight", "blk.{layer}.ffn_down.weight"),
    ("norm", "model.norm.weight", "output_norm.weight"),
    ("lm_head", "lm_head.weight", "output.weight"),
)
# The pivot head is ours alone: a tensor in a file beside the weights, with its layer in the metadata.
PIVOT_FILE, PIVOT_NAME = "pivot_head.safetensors", "pivot_head.weight"
# What the model card tells, in `config.json` under a key that transformers keeps and does not read.
DETAILS_KEY = "prom_jax"

_SAFETENSORS_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_GGUF_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_GGUF_TYPES = (*_GGUF_DTYPES, "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_GGUF_SETTINGS = {
    "block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip


def open_reader(source):
    """A reader of the weights of a Hugging Face directory, a hub id or a `.gguf` file.

    Raises:
      UserError: if they cannot be reached or read, or are of a model that is not supported.
    """
    path = local_path(source)
    return GGUFReader(path) if path.is_file() else SafetensorsReader(path)


def local_path(source, weights: bool = True) -> Path:
    """Where a model lies on this machine: a directory or a `.gguf` file, downloaded if `source` is a hub id.

    Args:
      source: a path or a hub id.
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
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)) or path.suffix == ".gguf":
        raise UserError(
            f"{source} does not exist: expected a Hugging Face directory, a .gguf file or a hub id owner/name"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source),
                allow_patterns=["*.json", "*.jinja", "tokenizer.model", *["*.safetensors"] * weights],
                ignore_patterns=["consolidated*", "original/*"],  # the same weights once more
            )
        )
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


class SafetensorsReader:
    """A Hugging Face directory with one or many safetensors files."""

    def __init__(self, directory):
        self.source = Path(directory)
        self.config, self.details = read_config(self.source)
        self._files = {}  # tensor -> the open file it is in, and that file's path
        for path, names in self._shards():
            file = _open_safetensors(path)
            held = set(file.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise UserError(f"{path} lacks {name}, which the index places there; fetch both again")
                self._files[name] = (file, path)
        if not self._files:
            raise UserError(f"{self.source} has no tensors: expected a whole model; fetch it again")
        dtypes = {self._dtype(name) for name in self._files}
        self.dtype = np.dtype(functools.reduce(jnp.promote_types, dtypes))
        self.config = self._resolve_tie()
        self.pivot_layer = self._open_pivot_head()

    @property
    def names(self) -> set[str]:
        # Old LLaMA folders carry the rotary frequencies, which follow from the config.
        ours = {PIVOT_NAME} | ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        return {n for n in self._files if n not in ours and not n.endswith(".rotary_emb.inv_freq")}

    def shape(self, name) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def where(self, name) -> Path:
        return self._files[name][1]

    def read(self, name, index) -> np.ndarray:
        return self._slice(name)[index]

    def _slice(self, name):
        return self._files[name][0].get_slice(name)

    def _dtype(self, name):
        dtype = self._slice(name).get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
            raise UserError(
                f"{self.where(name)}: {name} is of type {dtype}, expected one of "
                f"{', '.join(_SAFETENSORS_DTYPES)}; use the unquantised model"
            )
        return _SAFETENSORS_DTYPES[dtype]

    def _shards(self):
        """Pairs of a file and the tensors to take from it (None: all)."""
        index = self.source / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no object `weight_map`: fetch the file again")
            shards = {}
            for tensor, name in weight_map.items():
                if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                    raise UserError(
                        f"{index} names {name!r:.100}: expected safetensors files in the same folder; "
                        "do not use this folder unless you know who made it"
                    )
                shards.setdefault(name, []).append(tensor)
            yield from ((self.source / name, tensors) for name, tensors in sorted(shards.items()))
        elif (self.source / "model.safetensors").exists():
            yield self.source / "model.safetensors", None
        elif any(f.suffix in (".bin", ".pt", ".pth") for f in self.source.iterdir()):
            raise UserError(
                f"{self.source} has weights as pickle alone, which is never read (it can run code): expected "
                "model.safetensors; load it with transformers where you trust it, and save it again with "
                "`save_pretrained`"
            )
        else:
            raise UserError(f"{self.source} has no weights: expected model.safetensors or its index in it")

    def _resolve_tie(self) -> LlamaConfig:
        """transformers (5) ties only where the file does not contradict: an lm_head that differs stays."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if not self.config.tie_word_embeddings or not {head, embedding} <= set(self._files):
            return self.config
        rows = self.config.vocab_size
        parts = ((slice(i, min(i + 4096, rows)),) for i in range(0, rows, 4096))  # not all in memory at once
        equal = self.shape(head) == self.shape(embedding) == (rows, self.config.hidden_size) and all(
            np.array_equal(self.read(head, part), self.read(embedding, part)) for part in parts
        )
        return dataclasses.replace(self.config, tie_word_embeddings=equal)

    def _open_pivot_head(self) -> int:
        path = self.source / PIVOT_FILE
        if not path.exists():
            return 0
        file = _open_safetensors(path)
        layer = (file.metadata() or {}).get("pivot_layer", "")
        if PIVOT_NAME not in file.keys() or not re.fullmatch("[1-9][0-9]{0,4}", layer):  # noqa: SIM118 (no mapping)
            raise UserError(
                f"{path}: expected a tensor {PIVOT_NAME!r} and its layer as metadata 'pivot_layer'; "
                "delete the file to do without its pivot head"
            )
        self._files[PIVOT_NAME] = (file, path)
        return int(layer)


def read_config(directory: Path) -> tuple[LlamaConfig, dict]:
    """The architecture in a Hugging Face directory, and how the model was made (see `details` above)."""
    config = _read_json(directory / "config.json")
    details = config.pop(DETAILS_KEY, {})
    if not isinstance(details, dict):
        raise UserError(
            f"{directory / 'config.json'} sets {DETAILS_KEY}={details!r}: expected an object, as in an "
            "export; remove the key"
        )
    return LlamaConfig.from_hf(config), details


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: expected a whole Hugging Face model folder") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__}: expected a JSON object; fetch the file again"
        )
    return content


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, though the index names it: fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or damaged, fetch it again"
        ) from error


class GGUFReader:
    """A `.gguf` file of a Llama or Mistral, plain or quantised; values are dequantised as they are read."""

    pivot_layer = 0

    def __init__(self, path):
        self.source, self.details = Path(path), {}
        file = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in file.tensors}
        for tensor in file.tensors:
            if tensor.tensor_type.name not in _GGUF_TYPES:
                raise UserError(
                    f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, expected one of "
                    f"{', '.join(_GGUF_TYPES)}; use another quantisation of the model"
                )
            if len(tensor.shape) not in (1, 2):
                raise UserError(
                    f"{path}: {tensor.name} has {len(tensor.shape)} dimensions, expected 1 or 2; fetch the "
                    "file again"
                )
        self.config = _gguf_config(path, file.metadata, tensors)
        tensors.pop("rope_freqs.weight", None)
        hf_names = {
            theirs.format(layer=layer): hf.format(layer=layer)
            for _, hf, theirs in TENSORS
            for layer in range(self.config.num_hidden_layers)
        }
        self._tensors = {hf_names.get(name, name): tensor for name, tensor in tensors.items()}
        self.names = set(self._tensors)
        # Norms are float32 in every file: the matrices tell what the file is.
        types = {t.tensor_type.name for t in tensors.values() if len(t.shape) > 1}
        self.dtype = np.dtype(_GGUF_DTYPES.get(types.pop(), jnp.float32) if len(types) == 1 else jnp.float32)

    def shape(self, name) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def where(self, name) -> Path:
        return self.source

    def read(self, name, index) -> np.ndarray:
        tensor, shape = self._tensors[name], self.shape(name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        data = tensor.data.view(np.uint8)
        if len(shape) == 1:
            return gguf.dequantize(data, tensor.tensor_type)[index]
        rows = np.arange(shape[0])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF interleaves the two halves that RoPE turns into each other; Hugging Face has one after
            # the other.
            rows = rows.reshape(-1, self.config.head_dim // 2, 2).swapaxes(1, 2).ravel()
        row_slice, column_slice = (*index, slice(None))[:2]
        start, stop, _ = column_slice.indices(shape[1])
        first, last = start // block, -(-stop // block)  # whole blocks that cover the columns
        data = data[rows[row_slice], first * block_bytes : last * block_bytes]
        return gguf.dequantize(data, tensor.tensor_type)[:, start - first * block : stop - first * block]


def open_gguf(path) -> "_WholeFile":
    """A GGUF file, parsed once for weights and tokenizer: that takes seconds for a large vocabulary.

    Raises:
      UserError: if it is not one whole GGUF file.
    """
    status = os.stat(path)
    return _parse_gguf(str(path), status.st_mtime_ns, status.st_size)


class _WholeFile(gguf.GGUFReader):
    """The package's reader, kept within the file: it believes every length, takes a kilobyte for each element
    of an array, and follows arrays in arrays.

    `metadata`: the key-value pairs as Python values.
    """

    def __init__(self, path):
        super().__init__(path)
        if sum(tensor.n_bytes for tensor in self.tensors) > len(self.data):
            raise ValueError("its tensors overlap")
        self.metadata = {key: field.contents() for key, field in self.fields.items()}
        self.fields.clear()

    def _get(self, offset, dtype, count=1, override_order=None):
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        of, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, at = gguf.GGUFValueType(of[0]), orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            elements = list(self._strings(at, int(length[0])))
            size = sum(8 + len(element) for element in elements)
        elif kind in self.gguf_scalar_to_np:
            elements = [self._get(at, self.gguf_scalar_to_np[kind], length[0])]
            size = elements[0].nbytes
        else:
            raise ValueError("it has arrays in arrays")
        places = list(range(2, 2 + len(elements)))
        return 12 + size, [of, length, *elements], places, [gguf.GGUFValueType.ARRAY, kind]

    def _strings(self, at: int, count: int):
        data = memoryview(self.data)
        for _ in range(count):
            end = at + 8 + int.from_bytes(data[at : at + 8], sys.byteorder)
            if end > len(data):
                raise ValueError("it ends early")
            yield data[at + 8 : end]
            at = end


@functools.lru_cache(maxsize=1)
def _parse_gguf(path: str, *state_of_the_file: int) -> _WholeFile:
    try:
        file = _WholeFile(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise UserError(
            f"{path} is not a whole GGUF file ({error}): it was cut short or damaged, fetch it again"
        ) from error
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):  # 0: joined
        raise UserError(
            f"{path} is one of {parts!r:.100} parts: expected one file; join them with "
            "`llama-gguf-split --merge`"
        )
    return file


def _gguf_config(path, metadata: dict, tensors: dict) -> LlamaConfig:
    """The config in GGUF metadata, in the terms of a `config.json`."""
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "mistral"):
        raise UserError(
            f"{path} holds a model of architecture {architecture!r:.100}: expected 'llama' or 'mistral'"
        )
    prefix = architecture + "."
    settings = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for key, value in settings.items():
        if isinstance(value, list) or (key not in _GGUF_SETTINGS and value):
            raise UserError(f"{path} sets {prefix}{key:.100}={value!r:.100}, which is not supported")

    def need(key):
        if key not in settings:
            raise UserError(f"{path} lacks the setting {prefix}{key}: expected a whole model; fetch it again")
        return settings[key]

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight: expected a whole model; fetch it again")
    heads = need("attention.head_count")
    window = settings.get("attention.sliding_window") or None
    mistral = {"model_type": "mistral", "sliding_window": window}
    config = LlamaConfig.from_hf(
        {
            **(mistral if window or architecture == "mistral" else {"model_type": "llama"}),
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
            "hidden_size": need("embedding_length"),
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": settings.get("attention.head_count_kv", heads),
            "head_dim": settings.get("attention.key_length"),
            "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _decimal(settings.get("rope.freq_base", 10000.0)),
            "rope_scaling": _gguf_rope_scaling(settings),
            "max_position_embeddings": need("context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.get(key, config.head_dim) != config.head_dim:
            raise UserError(
                f"{path} sets {prefix}{key}={settings[key]!r:.100}: expected the head dimension, "
                f"{config.head_dim}"
            )
    return _with_rope_factors(path, config, tensors.get("rope_freqs.weight"))


def _decimal(value):
    """The shortest decimal of a number stored in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _gguf_rope_scaling(settings: dict) -> dict | None:
    kind = settings.get("rope.scaling.type", "none")
    return None if kind == "none" else {"rope_type": kind, "factor": settings.get("rope.scaling.factor")}


def _with_rope_factors(path, config: LlamaConfig, tensor) -> LlamaConfig:
    """Llama-3's rope scaling, which GGUF keeps as one divisor a frequency in the tensor `rope_freqs`."""
    if tensor is None:
        return config
    divisors = np.asarray(tensor.data, np.float32)
    if divisors.shape != (config.head_dim // 2,) or not np.all((divisors > 0) & (divisors < 1e6)):
        raise UserError(
            f"{path} has rope_freqs of the shape {list(divisors.shape)}, or not all above 0: expected a "
            f"divisor for each of {config.head_dim // 2} frequencies; fetch the file again"
        )
    # All published models have the low and high frequency factors 1 and 4 over 8192 positions, which are
    # `RopeScaling`'s defaults; the longest wave is divided by the whole factor.
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", _decimal(float(divisors.max()))))
    expected = rope_frequencies(config) / rope_frequencies(scaled)
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(
            f"{path} has rope_freqs of an unknown rope scaling: expected Llama-3's; "
            "use the model's Hugging Face directory instead"
        )
    return scaled
