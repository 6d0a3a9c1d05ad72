"""Hugging Face folders of safetensors, in and out."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from prom_jax.checkpoints import generation, hub, model_card
from prom_jax.checkpoints.params import check_tensors, head_tensor, hf_shapes
from prom_jax.checkpoints.reader import Reader
from prom_jax.models.auto import config_from_hf, config_to_hf, multimodal_of
from prom_jax.models.config import DecoderConfig
from prom_jax.tokenization import PreTrainedTokenizerFast, folder
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

# The rows of the model card, in `config.json` under a key that transformers keeps and does not read.
DETAILS_KEY = "prom_jax"
ADAPTER = "adapter_config.json"  # of peft
_NOTHING = MappingProxyType({})
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsReader:
    """A Hugging Face directory with one or many safetensors files.

    Of a multimodal model the language model alone is read, under the names of a model of text.

    Attributes:
      multimodal: what is known of multimodal models of that kind; None for a model of text.
      left_out: the names of the tensors of other parts of a multimodal model.
    """

    def __init__(self, directory):
        self.source = Path(directory)
        content, self.details = _read_config(self.source)
        self.config, self.multimodal = _config(self.source, content), multimodal_of(content.get("model_type"))
        self._files = {}  # tensor -> the open file it is in, that file's path, and its name in there
        self.left_out = set()
        for path, names in self._shards():
            file = open_safetensors(path)
            held = set(file.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise UserError(f"{path} lacks {name}, which the index says is there; fetch both again")
                ours = self.multimodal.text_tensor(name) if self.multimodal else name
                if ours is None:
                    self.left_out.add(name)
                else:
                    self._files[ours] = (file, path, name)
        if not self._files:
            raise UserError(f"{self.source} has no tensors: expected a whole model; fetch it again")
        dtypes = {self._dtype(name) for name in self._files}
        self.dtype = np.dtype(functools.reduce(jnp.promote_types, dtypes))
        self.config = self._resolve_tie()
        self.heads = dict(self._open_heads())

    @property
    def names(self) -> set[str]:
        # Old LLaMA folders carry the rotary frequencies, which follow from the config.
        ours = {head_tensor(head) for head in self.heads}
        ours |= {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        return {n for n in self._files if n not in ours and not n.endswith(".rotary_emb.inv_freq")}

    def shape(self, name) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def where(self, name) -> Path:
        return self._files[name][1]

    def read(self, name, index) -> np.ndarray:
        return self._slice(name)[index]

    def _slice(self, name):
        file, _, name_in_file = self._files[name]
        return file.get_slice(name_in_file)

    def _dtype(self, name):
        dtype = self._slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise UserError(
                f"{self.where(name)}: {name} is of type {dtype}, expected one of "
                f"{', '.join(_DTYPES)}; use the unquantised model"
            )
        return _DTYPES[dtype]

    def _shards(self):
        """Pairs of a file and the tensors to take from it (None: all)."""
        index = self.source / "model.safetensors.index.json"
        single = self.source / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
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
            if shards and single.exists() and single.name not in shards:
                raise UserError(
                    f"{self.source} has both {single.name} and an index of other files: expected one model; "
                    f"remove the index, as transformers takes {single.name}, or that file"
                )
            yield from ((self.source / name, tensors) for name, tensors in sorted(shards.items()))
        elif single.exists():
            yield single, None
        elif any(f.suffix in (".bin", ".pt", ".pth") for f in self.source.iterdir()):
            raise UserError(
                f"{self.source} has weights as pickle alone, which is never read (it can run code): expected "
                "model.safetensors; load it with transformers where you trust it, and save it again with "
                "`save_pretrained`"
            )
        else:
            raise UserError(f"{self.source} has no weights: expected model.safetensors or its index in it")

    def _resolve_tie(self) -> DecoderConfig:
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

    def _open_heads(self):
        """Further heads, and after which block each reads."""
        model = {path for _, path, _ in self._files.values()}  # shards may have any names
        for path in sorted(set(self.source.glob("*_head.safetensors")) - model):
            file, layer = open_head(path, [head_tensor(path.stem)])
            self._files[head_tensor(path.stem)] = (file, path, head_tensor(path.stem))
            yield path.stem, layer


def open_head(path: Path, names: list[str]):
    """Opens the file of a further head.

    Returns:
      The open file, and after which block the head reads.

    Raises:
      UserError: if it lacks one of the tensors, or the layer.
    """
    file = open_safetensors(path)
    layer = (file.metadata() or {}).get("pivot_layer", "")
    if not set(names) <= set(file.keys()) or not re.fullmatch("[1-9][0-9]{0,4}", layer):
        raise UserError(
            f"{path}: expected {' and '.join(f'a tensor {name!r}' for name in names)} and its layer as "
            "metadata 'pivot_layer'; delete the file to do without its head"
        )
    return file, int(layer)


def read_config(directory: Path) -> tuple[DecoderConfig, dict]:
    """The architecture in a Hugging Face directory, and how the model was made (`Reader.details`).

    Raises:
      UserError: if there is none, or it is not supported.
    """
    content, details = _read_config(directory)
    return _config(directory, content), details


def _config(directory: Path, content: dict) -> DecoderConfig:
    """The architecture, with what the folder says of generation."""
    of_generation = generation.of_folder(directory, content)
    return dataclasses.replace(config_from_hf(content), generation=of_generation)


def _read_config(directory: Path) -> tuple[dict, dict]:
    """The content of a `config.json`, and what it says of how the model was made."""
    if (directory / ADAPTER).exists():
        has_model = (directory / "config.json").exists()
        raise UserError(
            f"{directory} holds an adapter ({ADAPTER}) "
            + ("beside its model, which transformers loads with it" if has_model else "and no whole model")
            + ": expected a model alone; load both with peft, call `merge_and_unload`, and save the result"
            + (f"; or remove {ADAPTER} to do without" if has_model else "")
        )
    content = read_json(directory / "config.json")
    details = content.pop(DETAILS_KEY, {})
    if not isinstance(details, dict):
        raise UserError(
            f"{directory / 'config.json'} sets {DETAILS_KEY}={details!r}: expected an object, as in an "
            "export; remove the key"
        )
    return content, details


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises UserError if there is none."""
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


def open_safetensors(path: Path):
    """An open safetensors file; raises UserError if it is not whole."""
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, though the index names it: fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or damaged, fetch it again"
        ) from error


def save_hf(
    reader: Reader,
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
      reader: of the model; `ParamsReader` for one in memory.
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
    directory, dtype, card = Path(directory), checked_dtype(dtype), model_card.public(card)
    shapes = hf_shapes(reader.config)
    check_tensors(reader, shapes)
    writer = is_main_process()
    with hub.whole_folder(directory, dtype.itemsize * sum(map(math.prod, shapes.values()))) as partial:
        if writer:
            _write_small_files(partial, reader.config, dtype, model_tokenizer, chat_template)
            _write_card(partial, directory.resolve().name, card)
        split = split_state_dict_into_shards_factory(
            shapes,
            get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_bytes,
        )
        for file_name, names in split.filename_to_tensors.items():
            path = partial / file_name if writer else os.devnull
            write_tensors(path, reader, names, dtype)
        for head, layer in reader.heads.items():
            write_head(partial, reader, [head_tensor(head)], dtype, layer)
        # A folder with another head has one too, so that who reads all files without it reads the model.
        if writer and (split.is_sharded or reader.heads):
            total = {"total_parameters": sum(map(math.prod, shapes.values()))}
            index = {"metadata": total | split.metadata, "weight_map": split.tensor_to_filename}
            write_json(partial / "model.safetensors.index.json", index)


def checked_dtype(dtype) -> np.dtype:
    """A dtype that tensors may be written in, by name or as numpy's; raises UserError for another one."""
    if str(dtype) not in _DTYPE_NAMES:
        raise UserError(f"export.dtype={str(dtype)!r}: expected one of {', '.join(_DTYPE_NAMES)}")
    return np.dtype(dtype)


def write_head(directory: Path, reader, names: list[str], dtype: np.dtype, layer: int):
    """Writes the tensors of a further head, which reads after block `layer`, into a file of its own. All
    processes must call it."""
    file_name = f"{names[0].partition('.')[0]}.safetensors"
    path = directory / file_name if is_main_process() else os.devnull
    write_tensors(path, reader, names, dtype, {"pivot_layer": str(layer)})


def write_tensors(path, reader, names: list[str], dtype: np.dtype, metadata: Mapping[str, str] = _NOTHING):
    """Writes tensors one by one: the safetensors library would want all those of a file in memory.

    The format: the header's length (8 bytes, little-endian), the header (JSON), the values in its order.

    Args:
      path: of the file.
      reader: that has the tensors.
      names: of the tensors.
      dtype: that they are written in.
      metadata: of the file, besides that it is in PyTorch's order.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name in names:
        end = start + math.prod(reader.shape(name)) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype.name],
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
            file.write(_as_dtype(name, whole, dtype).view(np.uint8).data)


def _as_dtype(name: str, whole: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor in another dtype; raises UserError for numbers that this one has not."""
    with np.errstate(over="ignore"):
        written = np.ascontiguousarray(whole, dtype)
    if dtype == np.float16 and (lost := np.count_nonzero(~np.isfinite(written) & np.isfinite(whole))):
        raise UserError(
            f"{name} has {lost} values beyond float16, whose largest is 65504: export in bfloat16 or float32 "
            "(export.dtype, --dtype)"
        )
    return written


def _write_small_files(
    directory: Path,
    config: DecoderConfig,
    dtype: np.dtype,
    model_tokenizer: PreTrainedTokenizerFast,
    chat_template: str | None,
):
    write_json(directory / "config.json", {**config_to_hf(config), "torch_dtype": dtype.name})
    write_json(directory / generation.FILE, generation.keys(config, model_tokenizer))
    folder.save(model_tokenizer, directory, chat_template, config.max_position_embeddings)
    if not (directory / "tokenizer.json").exists():
        console.print(
            "WARNING   the vocabulary has pieces of one score, which a tokenizer.json cannot rank: llama.cpp "
            "cuts text as in training, transformers 4 does with use_fast=False, transformers 5 does not"
        )


def _write_card(directory: Path, name: str, card: Mapping[str, object]):
    """The rows of the model card in `config.json`, for programs, and in a README for people."""
    if card:
        path = directory / "config.json"
        write_json(path, {**read_json(path), DETAILS_KEY: card})
    (directory / "README.md").write_text(model_card.model_card(card, name), encoding="utf-8")


def write_json(path: Path, content: dict):
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
