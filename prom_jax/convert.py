"""python -m prom_jax.convert to_hf SOURCE DESTINATION [--dtype=bfloat16]
python -m prom_jax.convert from_hf SOURCE DESTINATION

to_hf writes a Hugging Face directory; from_hf an Orbax checkpoint. SOURCE is whatever prom_jax loads: a
Hugging Face directory or hub id, a .gguf file, an Orbax checkpoint or a work directory.
"""

import argparse
from pathlib import Path

from prom_jax import checkpoints, cli, llama, models
from prom_jax.errors import UserError
from prom_jax.workdir import make_directory


def main(argv=None):
    """Reads the command line and converts."""
    parser = argparse.ArgumentParser(
        prog="python -m prom_jax.convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("direction", choices=("to_hf", "from_hf"))
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    arguments = parser.parse_args(argv)
    convert = to_hf if arguments.direction == "to_hf" else from_hf
    print(f"{arguments.source} -> {arguments.destination}", flush=True)
    convert(arguments.source, arguments.destination, arguments.dtype)
    print(f"wrote {arguments.destination}")


def to_hf(source, destination, dtype=None):
    """Writes `source` as a Hugging Face directory, in its own dtype or another."""
    model, model_tokenizer = models.load(source, param_dtype=dtype)
    directory = checkpoints.find(source)
    card = checkpoints.Description.read(directory).details if directory else {"base_model": str(source)}
    # A model that was not trained here keeps the chat template that it came with.
    template = None if "method" in card else model_tokenizer.chat_template
    models.save_hf(model, model_tokenizer, destination, card=card, template=template)


def from_hf(source, destination, dtype=None):
    """Writes `source` as an Orbax checkpoint, in its own dtype or another."""
    destination = Path(destination)
    make_directory(destination)
    if any(destination.iterdir()):
        raise UserError(f"{destination} is not empty: give a new place")
    model, model_tokenizer = models.load(source, param_dtype=dtype)
    params = llama.to_params(model)
    dtype = params["embed_tokens"].dtype.name
    description = checkpoints.Description(model.config, model.pivot_layer, dtype, {"base_model": str(source)})
    checkpoints.describe(destination, description, model_tokenizer)
    store = checkpoints.Checkpoints(destination)
    store.save(0, params=params)
    store.close()


if __name__ == "__main__":
    cli.guard(main)
