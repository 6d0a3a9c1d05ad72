"""python -m prom_jax.convert to_hf SOURCE DESTINATION [--dtype=bfloat16]
python -m prom_jax.convert from_hf SOURCE DESTINATION

to_hf writes a Hugging Face directory; from_hf an Orbax checkpoint. SOURCE is whatever prom_jax loads: a
Hugging Face directory or hub id, a .gguf file, an Orbax checkpoint or a work directory.
"""

import argparse

import numpy as np

from prom_jax.checkpoints import orbax, safetensors, storage
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.description import Description
from prom_jax.checkpoints.params import lazy_params
from prom_jax.data.chat import chat_template
from prom_jax.utils import cli
from prom_jax.utils.errors import UserError


def main(argv=None):
    """Reads the command line and converts."""
    arguments = parse(argv)
    convert = to_hf if arguments.direction == "to_hf" else from_hf
    print(f"{arguments.source} -> {arguments.destination}", flush=True)
    convert(arguments.source, arguments.destination, arguments.dtype)
    print(f"wrote {arguments.destination}")


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.convert", __doc__)
    add = parser.add_argument
    add("direction", choices=("to_hf", "from_hf"), help="what is written")
    add("source", help="what is read")
    add("destination", help="a new folder; from_hf: also gs://bucket/…")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the tensors (default: the source's)")
    return parser.parse_args(argv)


def to_hf(source, destination, dtype=None):
    """Writes `source` as a Hugging Face directory, in its own dtype or another, one tensor at a time."""
    reader, tokenizer = models.open_source(source)
    card = reader.details or {"base_model": str(source)}
    # A model that was not trained here keeps the chat template that it came with.
    template = None if "prompts" in card else tokenizer.chat_template
    safetensors.save_hf(
        reader,
        tokenizer,
        destination,
        dtype=dtype or reader.dtype,
        chat_template=template or chat_template(tokenizer, card.get("prompts", "en")),
        card=card,
    )


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
