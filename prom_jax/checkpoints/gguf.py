"""GGUF files, read."""

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np

from prom_jax.checkpoints import generation
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf, family_of, known_families
from prom_jax.models.config import DecoderConfig, RopeScaling
from prom_jax.models.layers import rope_frequencies
from prom_jax.utils.errors import UserError

_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_TYPES = (
    *_DTYPES, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4",
    "NVFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
_SETTINGS = {
    "block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip


class GGUFReader:
    """A `.gguf` file, plain or quantised; values are dequantised as they are read."""

    def __init__(self, path):
        self.source, self.details, self.heads = Path(path), {}, {}
        file = open_gguf(path)
        tensors = {tensor.name: tensor for tensor in file.tensors}
        for tensor in file.tensors:
            if tensor.tensor_type.name not in _TYPES:
                raise UserError(
                    f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, expected one of "
                    f"{', '.join(_TYPES)}; use another quantisation of the model"
                )
            if len(tensor.shape) not in (1, 2):
                raise UserError(
                    f"{path}: {tensor.name} has {len(tensor.shape)} dimensions, expected 1 or 2; fetch the "
                    "file again"
                )
        embedding, rope_freqs = tensors.get("token_embd.weight"), tensors.pop("rope_freqs.weight", None)
        config = config_of(
            path,
            file.metadata,
            tensors.keys(),
            0 if embedding is None else int(embedding.shape[-1]),
            None if rope_freqs is None else np.asarray(rope_freqs.data, np.float32),
        )
        self.config = dataclasses.replace(config, generation=generation.of_gguf(file.metadata, path))
        hf_names = {
            row.gguf.format(layer=layer): row.hf.format(layer=layer)
            for row in decoder.tensors(self.config)
            for layer in range(self.config.num_hidden_layers)
        }
        self._format = family_of(self.config).gguf
        self._tensors = {hf_names.get(name, name): tensor for name, tensor in tensors.items()}
        self.names = set(self._tensors)
        # Norms are float32 in every file: the matrices tell what the file is.
        types = {t.tensor_type.name for t in tensors.values() if len(t.shape) > 1}
        self.dtype = np.dtype(_DTYPES.get(types.pop(), jnp.float32) if len(types) == 1 else jnp.float32)

    def shape(self, name) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def where(self, name) -> Path:
        return self.source

    def read(self, name, index) -> np.ndarray:
        tensor, shape = self._tensors[name], self.shape(name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        data = tensor.data.view(np.uint8)
        if len(shape) == 1:
            values = gguf.dequantize(data, tensor.tensor_type)
            if name.endswith(("q_proj.bias", "k_proj.bias")) and self._format.interleaved:
                values = values[self._deinterleaved(shape[0])]
            offset = self._format.norms_with_offset and name.endswith("norm.weight")
            return (values - 1 if offset else values)[index]
        rows = np.arange(shape[0])
        if name.endswith(("q_proj.weight", "k_proj.weight")) and self._format.interleaved:
            rows = self._deinterleaved(shape[0])
        row_slice, column_slice = (*index, slice(None))[:2]
        start, stop, _ = column_slice.indices(shape[1])
        first, last = start // block, -(-stop // block)  # whole blocks that cover the columns
        data = data[rows[row_slice], first * block_bytes : last * block_bytes]
        return gguf.dequantize(data, tensor.tensor_type)[:, start - first * block : stop - first * block]

    def _deinterleaved(self, rows: int) -> np.ndarray:
        """Rows of q or k in Hugging Face's order: of each head one half after the other, which RoPE turns
        into each other; in the file they alternate."""
        return np.arange(rows).reshape(-1, self.config.head_dim // 2, 2).swapaxes(1, 2).ravel()


class GGUFContent(NamedTuple):
    """What a GGUF file holds: its key-value pairs as Python values, and its tensors as the package has them;
    of a model in several files the pairs of the first, and the tensors of all."""

    metadata: dict
    tensors: list


def open_gguf(path) -> GGUFContent:
    """A GGUF file, parsed once for weights and tokenizer: that takes seconds for a large vocabulary.

    Args:
      path: the file; of a model in several, named NAME-00001-of-00003.gguf, any of them.

    Raises:
      UserError: if it is not one whole GGUF file, or one of several that are not all there.
    """
    status = os.stat(path)
    return _open(str(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _open(path: str, *state_of_the_file: int) -> GGUFContent:
    file = _parse(path)
    count = file.metadata.get("split.count", 1)
    if count in (0, 1):  # 0: joined
        return GGUFContent(file.metadata, file.tensors)
    named = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", path)
    if type(count) is not int or not named or int(named[3]) != count:
        raise UserError(
            f"{path} is one of {count!r:.100} parts: expected all of them beside each other, named "
            "NAME-00001-of-00003.gguf and so on; give them their names back"
        )
    paths = [f"{named[1]}{number:05}-of-{named[3]}.gguf" for number in range(1, count + 1)]
    if missing := [name for name in paths if not os.path.isfile(name)]:
        raise UserError(f"{missing[0]} does not exist: expected all {count} parts of the model; fetch it")
    files = [_parse(name) for name in paths]
    tensors = [tensor for file in files for tensor in file.tensors]
    for number, (name, file) in enumerate(zip(paths, files)):
        if (file.metadata.get("split.no"), file.metadata.get("split.count")) != (number, count):
            raise UserError(f"{name} is not part {number + 1} of {count}, as its name says: fetch it again")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise UserError(
            f"{path}: its parts hold a tensor twice; expected parts of one model, fetch them again"
        )
    return GGUFContent(files[0].metadata, tensors)


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


def _parse(path: str) -> _WholeFile:
    try:
        return _WholeFile(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise UserError(
            f"{path} is not a whole GGUF file ({error}): it was cut short or damaged, fetch it again"
        ) from error


def config_of(path, metadata: dict, tensors: Collection[str], vocab_size: int, rope_freqs) -> DecoderConfig:
    """What a GGUF file says of an architecture, in the terms of a `config.json`.

    Args:
      path: of the file, for messages.
      metadata: its key-value pairs.
      tensors: the names of its tensors.
      vocab_size: rows of the embedding.
      rope_freqs: the tensor of that name, or None.

    Returns:
      The architecture.

    Raises:
      UserError: for an architecture or a setting that is not supported.
    """
    architecture = metadata.get("general.architecture")
    spec = _specs().get(architecture) if isinstance(architecture, str) else None
    if spec is None:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r:.100}: expected one of "
            f"{', '.join(map(repr, _specs()))}"
        )
    prefix = f"{architecture}."
    settings = {k.removeprefix(prefix): _decimal(v) for k, v in metadata.items() if k.startswith(prefix)}
    for key, value in settings.items():
        if isinstance(value, list) or (key not in _SETTINGS and key not in spec.settings and value):
            raise UserError(f"{path} sets {prefix}{key:.100}={value!r:.100}, which is not supported")

    def need(key):
        if key not in settings:
            raise UserError(f"{path} lacks the setting {prefix}{key}: expected a whole model; fetch it again")
        return settings[key]

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} lacks the tensor token_embd.weight: expected a whole model; fetch it again")
    sizes = ("attention.head_count", "embedding_length", "attention.key_length", "rope.dimension_count")
    for key in sizes:
        if type(value := settings.get(key, 1)) is not int or not 0 < value < 2**31:
            raise UserError(f"{path} sets {prefix}{key}={value!r:.100}: expected a whole number above 0")
    heads = need("attention.head_count")
    head_dim = settings.get("attention.key_length") or need("embedding_length") // heads
    rotated = settings.get("rope.dimension_count", head_dim)
    config = config_from_hf(
        {
            "vocab_size": vocab_size,
            "hidden_size": need("embedding_length"),
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": settings.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "rope_theta": settings.get("rope.freq_base", 10000.0),
            "rope_scaling": _rope_scaling(settings),
            "max_position_embeddings": need("context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
            **({} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}),
            **spec.config_keys(settings, tensors),
        }
    )
    if settings.get("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{path} sets {prefix}attention.value_length={settings['attention.value_length']!r:.100}: "
            f"expected the head dimension, {head_dim}"
        )
    return _with_rope_factors(path, config, rope_freqs)


def _specs() -> dict:
    """How each architecture is held, by its name in GGUF."""
    return {family.gguf.architecture: family.gguf for family in known_families().values() if family.gguf}


def _decimal(value):
    """The shortest decimal of a number stored in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(settings: dict) -> dict | None:
    kind = settings.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    original = settings.get("rope.scaling.original_context_length")
    original = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": settings.get("rope.scaling.factor"), **original}


def _with_rope_factors(path, config: DecoderConfig, divisors) -> DecoderConfig:
    """Llama-3's rope scaling, which GGUF keeps as one divisor a frequency in the tensor `rope_freqs`."""
    if divisors is None:
        return config
    if divisors.shape != (config.head_dim // 2,) or not np.all((divisors > 0) & (divisors < 1e6)):
        raise UserError(
            f"{path} has rope_freqs of the shape {list(divisors.shape)}, or not all above 0: expected a "
            f"divisor for each of {config.head_dim // 2} frequencies; fetch the file again"
        )
    # All published models have the low and high frequency factors 1 and 4 over 8192 positions, which are
    # `RopeScaling`'s defaults; the longest wave is divided by the whole factor.
    scaling = RopeScaling("llama3", _decimal(float(divisors.max())))

    def scaled(rope):
        if rope is None:
            return None
        rope_scaled = dataclasses.replace(rope, scaling=scaling)
        expected = rope_frequencies(rope, config.head_dim) / rope_frequencies(rope_scaled, config.head_dim)
        if not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(
                f"{path} has rope_freqs of an unknown rope scaling: expected Llama-3's; "
                "use the model's Hugging Face directory instead"
            )
        return rope_scaled

    layers = tuple(dataclasses.replace(kind, rope=scaled(kind.rope)) for kind in config.layers)
    return dataclasses.replace(config, layers=layers)
