"""A model from anywhere, ready to use, and back out."""

from typing import cast

import jax

from prom_jax.checkpoints import gguf, model_card, params, peft, safetensors
from prom_jax.checkpoints.adapter import AdapterReader, Merged
from prom_jax.checkpoints.description import DESCRIPTION, Description, find, read_tokenizer
from prom_jax.checkpoints.hub import local_path
from prom_jax.checkpoints.orbax import CheckpointReader
from prom_jax.checkpoints.reader import Reader
from prom_jax.data.chat import chat_template
from prom_jax.models import decoder
from prom_jax.models.blocks import Compute
from prom_jax.models.config import DecoderConfig
from prom_jax.tokenization import folder
from prom_jax.tokenization import gguf as gguf_tokenizer
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError


def open_source(source):
    """Opens a Hugging Face directory, hub id, `.gguf` file or Orbax checkpoint.

    An Orbax checkpoint is a directory of steps, of which the latest is read, or one step of it. An adapter is
    read as its model with the adapter merged (`adapter.Merged`). A line tells which keys of a `config.json`
    are skipped.

    Returns:
      Its reader and its tokenizer.

    Raises:
      UserError: if it cannot be reached or read, or is of a model that is not supported.
    """
    directory = find(source)
    if directory:
        reader = CheckpointReader(directory)
        return _merge(reader), read_tokenizer(reader.source)
    reader, tokenizer = open_reader(source), load_tokenizer(source)
    _check_tokens(source, reader.config, tokenizer)
    _print_skipped(source, reader.config)
    return reader, tokenizer


def open_reader(source) -> Reader:
    """A reader of the weights of a Hugging Face directory, a hub id or a `.gguf` file. A line tells which
    tensors of a multimodal model are left out.

    Raises:
      UserError: if they cannot be reached or read, or are of a model that is not supported.
    """
    path = local_path(source)
    if path.is_file():
        return gguf.GGUFReader(path)
    if peft.is_adapter(path):
        return _merge(peft.PEFTReader(path))
    reader = safetensors.SafetensorsReader(path)
    if reader.left_out:
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in reader.left_out})
        console.print(
            f"left out  {len(reader.left_out)} tensors of {' and '.join(parts)} of {source}, which is a "
            f"{reader.multimodal.architecture}: its language model alone is read"
        )
    return reader


def _merge(adapter) -> Reader:
    """The reader of an adapter's model with the adapter merged; of a checkpoint without one, itself."""
    if adapter.lora is None:
        return adapter
    if not adapter.base:  # heads of low rank alone
        return Merged(adapter, adapter)
    base, _ = open_source(adapter.base)
    if getattr(adapter, "fingerprint", None) not in (None, params.fingerprint(base)):
        raise UserError(
            f"{adapter.source} holds an adapter of {adapter.base}, which is another model now: expected the "
            "one that it was trained on; put that back in its place"
        )
    return Merged(base, adapter)


def load_tokenizer(source):
    """The tokenizer of a Hugging Face directory, a hub id or a `.gguf` file, which adds BOS and EOS exactly
    where the model's own does.

    Raises:
      UserError: if there is no tokenizer, it is of a kind that is not supported, or it has no EOS token.
    """
    path = local_path(source)
    if path.is_file():
        return gguf_tokenizer.load(gguf.open_gguf(path).metadata, path, source)
    if peft.is_adapter(path) and not folder.has_tokenizer(path):
        return load_tokenizer(peft.read_config(path)[1])
    return folder.load(path, source)


def license_of(source) -> str | None:
    """The licence that a model's card names, or its `.gguf` file; None where they name none."""
    if find(source):
        return None
    path = local_path(source, weights=False)
    if path.is_file():
        named = gguf.open_gguf(path).metadata.get("general.license")
        return named if isinstance(named, str) else None
    return model_card.license_of(path / "README.md")


def default_compute_dtype() -> str:
    """float32 on CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(source, mesh=None, compute_dtype: str | None = None, param_dtype: str | None = None):
    """Loads a model to compute with.

    Args:
      source: Hugging Face directory or hub id, `.gguf` file, or Orbax checkpoint (a work directory too).
      mesh: of `sharding.make_mesh`; None for one device.
      compute_dtype: 'float32' or 'bfloat16'; None for float32 on CPU and bfloat16 elsewhere.
      param_dtype: of the parameters; None for the source's.

    Returns:
      a `models.decoder.Decoder`, with a pivot head if the source has one, and a transformers tokenizer.

    Raises:
      UserError: as `open_source`, and for missing or misshapen tensors.
    """
    reader, model_tokenizer = open_source(source)
    return build(reader, mesh, compute_dtype, param_dtype), model_tokenizer


def build(
    reader: Reader, mesh=None, compute_dtype: str | None = None, param_dtype: str | None = None
) -> decoder.Decoder:
    """The model of a reader that `open_source` gave; the arguments are those of `load`."""
    compute = Compute(dtype=compute_dtype or default_compute_dtype())
    loaded = params.load_params(reader, mesh, dtype=param_dtype, heads=reader.heads)
    return decoder.with_params(decoder.abstract(reader.config, compute=compute, heads=reader.heads), loaded)


def save_hf(
    model: decoder.Decoder, model_tokenizer, directory, *, dtype=None, card=None, template=None, base=None
):
    """Writes a directory that transformers' `from_pretrained` loads as it is.

    The tokenizer gets the training prompt as its chat template. A pivot head goes into a file of its own,
    which `load` picks up.

    Args:
      dtype: of the tensors, default that of the parameters.
      card: rows of the model card.
      template: a chat template (jinja) in place of the training prompt.
      base: reader of the model that a model's adapters are merged into, in place of its own parameters, which
        may be of less precision.

    Raises:
      UserError: if the directory holds something else, or cannot be written.
    """
    trained = params.ParamsReader(model)
    reader: Reader = trained
    if model.lora:
        reader = Merged(base or trained, cast(AdapterReader, trained))
    safetensors.save_hf(
        reader,
        model_tokenizer,
        directory,
        dtype=dtype or reader.dtype,
        chat_template=chat_template(model_tokenizer) if template is None else template,
        card=card or {},
    )


def open_config(source):
    """The architecture and tokenizer of a model, without its weights, which need not be there. A line tells
    which keys of its `config.json` are skipped.

    Args:
      source: as for `open_source`.

    Returns:
      Its configuration and its tokenizer. (Only the weights tell whether a head that a directory says is tied
      differs from the embeddings.)

    Raises:
      UserError: if it cannot be reached or read, or is of a model that is not supported.
    """
    directory = find(source)
    if directory:
        directory = directory if (directory / DESCRIPTION).is_file() else directory.parent
        return Description.read(directory).config, read_tokenizer(directory)
    path = local_path(source, weights=False)
    if peft.is_adapter(path):
        return open_config(peft.read_config(path)[1])[0], load_tokenizer(path)
    config = gguf.GGUFReader(path).config if path.is_file() else safetensors.read_config(path)[0]
    tokenizer = load_tokenizer(path)
    _check_tokens(source, config, tokenizer)
    _print_skipped(source, config)
    return config, tokenizer


def _check_tokens(source, config: DecoderConfig, tokenizer):
    """Raises UserError if there is a token without a row of the embedding. Padding may be one: it is never
    computed with."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    known = added | {
        i: tokenizer.convert_ids_to_tokens(i) for i in range(config.vocab_size, tokenizer.vocab_size)
    }
    beyond = {i: known[i] for i in sorted(known) if i >= config.vocab_size}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        beyond.pop(tokenizer.pad_token_id, None)
    if beyond:
        number, name = next(iter(beyond.items()))
        raise UserError(
            f"{source} has a tokenizer with {len(beyond)} tokens beyond its model: {name!r:.100} is number "
            f"{number}, and the embedding has {config.vocab_size} rows; take the tokenizer that belongs to "
            "the model, or resize the embedding (`model.resize_token_embeddings` of transformers)"
        )


def _print_skipped(source, config: DecoderConfig):
    if config.skipped:
        console.print(
            f"skipped   keys of the config.json of {source} that cannot change the forward pass: "
            f"{', '.join(config.skipped)}"
        )
