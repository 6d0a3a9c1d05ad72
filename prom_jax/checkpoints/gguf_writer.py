"""GGUF files, written: a model with its tokenizer in one file, for llama.cpp and what builds on it."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prom_jax.checkpoints import generation
from prom_jax.checkpoints.gguf import config_of
from prom_jax.checkpoints.params import check_tensors, hf_shapes
from prom_jax.checkpoints.reader import Reader
from prom_jax.models import decoder
from prom_jax.models.auto import family_of
from prom_jax.models.config import DecoderConfig
from prom_jax.models.family import GGUF
from prom_jax.models.layers import rope_frequencies
from prom_jax.tokenization import gguf as gguf_tokenizer
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # that the package can quantise to
PART = 2**24  # values of a matrix that are in memory at a time


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor to write: its name in the file, that of its source, its shape and its type."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.kind))


def write(reader: Reader, tokenizer, path, kind: str, chat_template: str | None, name: str):
    """Writes a model as one GGUF file, a part of a tensor at a time. The file appears whole or not at all.

    Norms and biases are float32 in every file, and matrices are float16 whose rows are no whole blocks of the
    type. A pivot head is left out: the format has no place for it.

    Args:
      reader: of the model.
      tokenizer: the model's.
      path: of the file.
      kind: of the matrices, one of TYPES.
      chat_template: jinja, of the prompts that the model was trained on; None for none.
      name: of the model, for those who list files.

    Raises:
      UserError: for a family or a setting that the format cannot say, a tokenizer that llama.cpp would read
        otherwise, values beyond float16, or if the file cannot be written.
    """
    path, config = Path(path), reader.config
    spec = _format(config)
    if path.exists():
        raise UserError(f"{path} exists: expected a new file; choose another name or remove it")
    check_tensors(reader, hf_shapes(config))
    rows, rope_freqs = list(_rows(config, gguf.GGMLQuantizationType[kind.upper()])), _rope_divisors(config)
    metadata = {
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_settings(config),
        **gguf_tokenizer.metadata(tokenizer, config.vocab_size),
        **_generation(config, tokenizer),
    }
    if chat_template:
        metadata["tokenizer.chat_template"] = chat_template
    _check_readable(path, config, metadata, rows, rope_freqs)
    if any(config.windows) and not spec.windows:
        console.print(
            "WARNING   llama.cpp has no sliding window for this family: beyond "
            f"{min(filter(None, config.windows))} tokens it computes otherwise"
        )
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(partial, reader, metadata, rows, rope_freqs)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error}): free some space or choose another place; nothing was "
            "left there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


_FILE_TYPES = {"f32": "ALL_F32"}  # by their names in the package, where it is not MOSTLY_…


def _rows(config: DecoderConfig, kind) -> Iterator[_Row]:
    shapes = hf_shapes(config)
    for row in decoder.tensors(config):
        for layer in range(config.num_hidden_layers if row.in_layers else 1):
            source = row.hf.format(layer=layer)
            shape = shapes[source]
            block, _ = gguf.GGML_QUANT_SIZES[kind]
            of_row = gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind
            of_row = of_row if len(shape) > 1 else gguf.GGMLQuantizationType.F32
            yield _Row(row.gguf.format(layer=layer), source, shape, of_row)


def _format(config: DecoderConfig) -> GGUF:
    """How GGUF files hold the model's family; raises UserError where they do not."""
    spec = family_of(config).gguf
    if spec is None:
        raise UserError(f"{config.model_type!r} models are not written as GGUF: expected another family")
    return spec


def _settings(config: DecoderConfig) -> dict:
    """Sizes and rotary embeddings, and what the family adds."""
    spec = _format(config)
    ropes = [kind.rope for kind in config.layers if kind.rope and not kind.window]
    rope = next(iter(ropes or filter(None, config.ropes)))
    settings: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(config.head_dim * rope.share),
        "rope.freq_base": rope.theta,
    }
    scaling = rope.scaling
    if scaling and scaling.rope_type in ("linear", "yarn"):
        settings |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    if scaling and scaling.rope_type == "yarn":
        settings["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    settings |= spec.settings_of(config)
    return {f"{spec.architecture}.{key}": value for key, value in settings.items() if value is not None}


def _rope_divisors(config: DecoderConfig) -> np.ndarray | None:
    """Llama-3's rope scaling, which the format keeps as a tensor: a divisor of each frequency."""
    (rope, *_) = filter(None, config.ropes)
    if rope.scaling is None or rope.scaling.rope_type != "llama3":
        return None
    plain = rope_frequencies(dataclasses.replace(rope, scaling=None), config.head_dim)
    return (plain / rope_frequencies(rope, config.head_dim)).astype(np.float32)


def _generation(config: DecoderConfig, tokenizer) -> dict:
    """Stop tokens besides EOS, of which the format names two, and settings of sampling."""
    _, *more = generation.stop_tokens(config, tokenizer)
    stops = dict(zip(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), more))
    sampling = generation.sampling(config)
    names = generation.GGUF_SAMPLING
    return {**stops, **{f"general.sampling.{names[key]}": value for key, value in sampling.items()}}


def _check_readable(path, config: DecoderConfig, metadata: dict, rows: list[_Row], rope_freqs):
    """Raises UserError unless the file says of the model all that its config does."""
    names = {row.name: row.shape for row in rows}
    again = config_of(path, {"general.architecture": _format(config).architecture, **metadata},
                      names, config.vocab_size, rope_freqs)  # fmt: skip
    # Special tokens may be the tokenizer's, and a Mistral without a window is a Llama.
    same = ("model_type", "bos_token_id", "eos_token_id", "pad_token_id")
    again = dataclasses.replace(again, **{name: getattr(config, name) for name in same})
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.compare and ours != theirs and not _close(ours, theirs):
            raise UserError(
                f"GGUF cannot say all of this model: {field.name} would be read as {theirs!r:.200}, and is "
                f"{ours!r:.200}; use its Hugging Face folder instead"
            )


def _close(a, b) -> bool:
    """Whether they are one number but for float32's rounding."""
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6)


def _write_file(path: Path, reader: Reader, metadata: dict, rows: list[_Row], rope_freqs):
    writer = gguf.GGUFWriter(path, _format(reader.config).architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_string)(key, value)
    if rope_freqs is not None:
        writer.add_tensor_info("rope_freqs.weight", rope_freqs.shape, rope_freqs.dtype, rope_freqs.nbytes)
    for row in rows:
        writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), row.num_bytes, raw_dtype=row.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        if rope_freqs is not None:
            rope_freqs.tofile(file)
            writer.write_padding(file, rope_freqs.nbytes)
        for row in rows:
            for part in _parts(reader, row):
                _quantized(part, row).tofile(file)
            writer.write_padding(file, row.num_bytes)
    finally:
        writer.close()


def _parts(reader: Reader, row: _Row) -> Iterator[np.ndarray]:
    """The values of a tensor as the format orders them, in float32, some rows at a time."""
    spec, shape = _format(reader.config), row.shape
    if len(shape) == 1:
        values = reader.read(row.source, (slice(None),)).astype(np.float32)
        if spec.interleaved and row.source.endswith(("q_proj.bias", "k_proj.bias")):
            values = _interleaved(values, reader.config.head_dim)
        yield values + 1 if spec.norms_with_offset and row.source.endswith("norm.weight") else values
        return
    turned = spec.interleaved and row.source.endswith(("q_proj.weight", "k_proj.weight"))
    of_head = reader.config.head_dim if turned else 1
    step = max(PART // shape[1] // of_head, 1) * of_head
    for first in range(0, shape[0], step):
        values = reader.read(row.source, (slice(first, min(first + step, shape[0])), slice(None)))
        values = np.asarray(values, np.float32)
        yield _interleaved(values, of_head) if turned else values


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k in the format's order: of each head, those that RoPE turns into each other alternate."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _quantized(values: np.ndarray, row: _Row) -> np.ndarray:
    with np.errstate(over="ignore"):
        written = gguf.quantize(values, row.kind)
    if row.kind == gguf.GGMLQuantizationType.F16 and (lost := np.count_nonzero(~np.isfinite(written))):
        raise UserError(
            f"{row.source} has {lost} values beyond float16, whose largest is 65504: choose --type=bf16"
        )
    return written
