"""python -m prom_jax.convert to_hf SOURCE DESTINATION [--dtype=bfloat16]
python -m prom_jax.convert from_hf SOURCE DESTINATION
python -m prom_jax.convert to_gguf SOURCE FILE.gguf [--type=q8_0]
python -m prom_jax.convert merge ADAPTER DESTINATION [--dtype=bfloat16]

to_hf writes a Hugging Face directory, from_hf an Orbax checkpoint, to_gguf a file for llama.cpp and Ollama,
merge a Hugging Face directory of an adapter's model with the adapter in it. SOURCE is whatever prom_jax
loads: a Hugging Face directory or hub id, a .gguf file, an Orbax checkpoint or a work directory; an adapter
of any of these is merged by all of them.
"""

import argparse
from pathlib import Path

import numpy as np

from prom_jax.checkpoints import gguf_writer, orbax, safetensors, storage
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.adapter import Merged
from prom_jax.checkpoints.description import Description
from prom_jax.checkpoints.params import lazy_params
from prom_jax.data.chat import chat_template
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError


def main(argv=None):
    """Reads the command line and converts."""
    arguments = parse(argv)
    print(f"{arguments.source} -> {arguments.destination}", flush=True)
    if arguments.direction == "to_gguf":
        to_gguf(arguments.source, arguments.destination, arguments.type)
    else:
        convert = {"to_hf": to_hf, "from_hf": from_hf, "merge": merge}[arguments.direction]
        convert(arguments.source, arguments.destination, arguments.dtype)
    print(f"wrote {arguments.destination}")


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.convert", __doc__)
    add = parser.add_argument
    add("direction", choices=("to_hf", "from_hf", "to_gguf", "merge"), help="what is written")
    add("source", help="what is read")
    add("destination", help="a new folder; from_hf: also gs://bucket/…; to_gguf: a new file")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the tensors (default: the source's)")
    add("--type", choices=gguf_writer.TYPES, default="f16", help="to_gguf: of the matrices")
    return parser.parse_args(argv)


def to_hf(source, destination, dtype=None):
    """Writes `source` as a Hugging Face directory, in its own dtype or another, one tensor at a time."""
    reader, tokenizer, card, template = _open(source)
    safetensors.save_hf(
        reader,
        tokenizer,
        destination,
        dtype=dtype or reader.dtype,
        chat_template=template,
        card=card,
    )


def merge(source, destination, dtype=None):
    """`to_hf` of an adapter; raises UserError for what is none."""
    if not isinstance(models.open_source(source)[0], Merged):
        raise UserError(f"{source} has no adapter that could be merged: convert to_hf writes it as it is")
    to_hf(source, destination, dtype)


def to_gguf(source, destination, kind="f16"):
    """Writes `source` as one GGUF file with its tokenizer, matrices in one of `gguf_writer.TYPES`, a part of
    a tensor at a time."""
    reader, tokenizer, card, template = _open(source)
    name = Path(str(card.get("base_model", source))).name
    name = f"{name} {card['language']}" if "language" in card else name
    gguf_writer.write(reader, tokenizer, destination, kind, template, name)


def _open(source):
    """The reader and tokenizer of a source, its model card's rows, and its chat template: that of training,
    or the one that a model came with which was not trained here."""
    reader, tokenizer = models.open_source(source)
    card = reader.details or {"base_model": str(source)}
    template = None if "prompts" in card else tokenizer.chat_template
    return reader, tokenizer, card, template or chat_template(tokenizer, card.get("prompts", "en"))


def from_hf(source, destination, dtype=None):
    """Writes `source` as an Orbax checkpoint, in its own dtype or another, a part of a tensor at a time."""
    destination = storage.resolve_path(destination)
    with storage.reraise_storage_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
        # In an object store there is no folder before there is a file in it.
        if destination.exists() and any(destination.iterdir()):
            raise UserError(f"{destination} is not empty: give a new place")
    reader, tokenizer = models.open_source(source)
    dtype = np.dtype(dtype or reader.dtype)
    params = lazy_params(reader, heads=reader.heads, dtype=dtype)
    details = reader.details or {"base_model": str(source)}
    description = Description(reader.config, reader.heads, dtype.name, details)
    orbax.write(destination, description, tokenizer, params)


if __name__ == "__main__":
    cli.guard(main)
