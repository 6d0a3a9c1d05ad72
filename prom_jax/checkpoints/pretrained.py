"""A model from anywhere, ready to use, and back out."""

import jax

from prom_jax.checkpoints import reader as readers
from prom_jax.checkpoints import safetensors as weights
from prom_jax.checkpoints import training as checkpoints
from prom_jax.data.chat import chat_template
from prom_jax.models import decoder as llama
from prom_jax.tokenization import auto as tokenizer


def open_source(source):
    """What a model can be read from: a Hugging Face directory, hub id, `.gguf` file or Orbax checkpoint.

    An Orbax checkpoint is a directory of steps, of which the latest is read, or one step of it.
    Returns: its reader (config, dtype, pivot_layer and slices of tensors) and its tokenizer.
    Raises:
      UserError: if it cannot be reached or read, or is of a model that is not supported.
    """
    directory = checkpoints.find(source)
    if directory:
        reader = checkpoints.CheckpointReader(directory)
        return reader, checkpoints.load_tokenizer(reader.source)
    return readers.open_reader(source), tokenizer.load(source)


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
    Returns: a `llama.Llama`, with a pivot head if the source has one, and a transformers tokenizer.
    Raises:
      UserError: as `open_source`, and for missing or misshapen tensors.
    """
    reader, model_tokenizer = open_source(source)
    return build(reader, mesh, compute_dtype, param_dtype), model_tokenizer


def build(reader, mesh=None, compute_dtype: str | None = None, param_dtype: str | None = None) -> llama.Llama:
    """The model of a reader that `open_source` gave; the arguments are those of `load`."""
    compute = llama.Compute(dtype=compute_dtype or default_compute_dtype())
    pivot = {"pivot_layer": reader.pivot_layer, "pivot_head": reader.pivot_layer > 0}
    params = weights.load_params(reader, mesh, dtype=param_dtype, **pivot)
    return llama.with_params(llama.abstract(reader.config, compute=compute, **pivot), params)


def save_hf(model: llama.Llama, model_tokenizer, directory, *, dtype=None, card=None, template=None):
    """Writes a directory that transformers' `from_pretrained` loads as it is.

    The tokenizer gets the training prompt as its chat template. A pivot head goes into a file beside, which
    `load` picks up.

    Args:
      dtype: of the tensors, default that of the parameters.
      card: rows of the model card.
      template: a chat template (jinja) in place of the training prompt.
    Raises:
      UserError: if the directory holds something else, or cannot be written.
    """
    reader = weights.ParamsReader(llama.to_params(model), model.config)
    weights.save_hf(
        reader,
        model_tokenizer,
        directory,
        dtype=dtype or reader.dtype,
        chat_template=chat_template(model_tokenizer) if template is None else template,
        card=card or {},
    )


def open_config(source):
    """The architecture and tokenizer of a model, without its weights, which need not be there.

    Args:
      source: as for `open_source`.

    Returns:
      Its configuration and its tokenizer. (Only the weights tell whether a head that a directory says is tied
      differs from the embeddings.)

    Raises:
      UserError: if it cannot be reached or read, or is of a model that is not supported.
    """
    directory = checkpoints.find(source)
    if directory:
        directory = directory if (directory / checkpoints.DESCRIPTION).is_file() else directory.parent
        return checkpoints.Description.read(directory).config, checkpoints.load_tokenizer(directory)
    path = readers.local_path(source, weights=False)
    config = readers.open_reader(path).config if path.is_file() else readers.read_config(path)[0]
    return config, tokenizer.load(path)
