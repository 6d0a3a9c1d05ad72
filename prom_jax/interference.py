"""python -m prom_jax.interference --config=configs/th.py --out=DIR [--model=CHECKPOINT] [--batches=8]

Measures the cosine between the gradients of two kinds of text that PROM and its baselines train on, layer by
layer, at one checkpoint (see `prom_jax.analysis.interference`). DIR gets interference.json and
interference.png. The records are those of the run, in --workdir, and are made if missing.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.table import Table

from prom_jax import config as configuration
from prom_jax.analysis.interference import cosines, draw, inner_products, only, summary
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.checkpoints.adapter import with_adapter
from prom_jax.data.examples import further_streams
from prom_jax.data.loader import Batches
from prom_jax.data.records import Records, prepare
from prom_jax.models import decoder
from prom_jax.models.blocks import Compute
from prom_jax.models.decoder import check_exit
from prom_jax.parallel import sharding
from prom_jax.reporting.plots import interference_by_layer
from prom_jax.training import budget
from prom_jax.training.methods import find_method, known_methods
from prom_jax.training.objective import Method
from prom_jax.training.setup import find_lora, recipe
from prom_jax.utils import cli
from prom_jax.utils.console import console, track
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import as_dict, make_directory, write_json


def measure(config, workdir: Path, model: str, out: Path, methods: list[str], number: int) -> dict:
    """Runs the measurement and writes what it gives.

    Args:
      config: see `prom_jax.config`.
      workdir: of the run, whose records are used.
      model: whatever `models.open_source` takes.
      out: the folder for the results.
      methods: names of methods.
      number: of batches.

    Returns:
      The content of interference.json.

    Raises:
      UserError: for input that cannot be used.
    """
    configuration.check(config)
    config = configuration.only_language(config, "interference")
    if not methods or not set(methods) <= set(compared_methods()):
        raise UserError(f"--methods={','.join(methods)}: expected some of {','.join(compared_methods())}")
    make_directory(out)
    mesh = sharding.make_mesh(**config.mesh)
    reader, tokenizer = models.open_source(model)
    layer = configuration.pivot_layer(config, reader.config.num_hidden_layers)
    if reader.heads and not config.pivot.layer:
        layer = reader.heads.get("pivot_head", layer)
    check_exit(layer, reader.config.num_hidden_layers, "pivot.layer")
    # λ scales a gradient without turning it: any but 0 will do, whatever regulation says.
    measured = {name: find_method(name).from_config(config, layer, 1.0) for name in methods}
    network = load(config, reader, mesh, measured.values())
    has_english = bool(config.data.english) or config.pivot.translation_source
    everything = find_method("prom" if has_english else "bactrian").from_config(config, layer, 1.0)
    named = dict.fromkeys(texts.stream for method in measured.values() for texts in method.compared)
    streams = (*everything.streams, *(stream for stream in named if stream not in ("target", "english")))
    examples = dataclasses.replace(
        recipe(config, everything), streams=streams, more=further_streams(tuple(config.data.streams))
    )
    data = prepare(examples, tokenizer, workdir / "records")
    shape = {"sequences": config.batch.sequences, "seq_len": config.data.seq_len}
    batches = Batches(data.train, **shape, seed=config.seed, epochs=1.0)
    steps = draw(batches, data.train, measured.values(), number)
    layers = network.config.num_hidden_layers
    console.print(
        f"model     {model}: {layers} layers, computed in {network.compute.dtype}\n"
        f"mesh      {sharding.describe(mesh)}\n"
        f"batches   {number} of the {len(batches)} of an epoch, rows and their length {batches.shapes}"
    )
    with jax.set_mesh(mesh):
        values = {
            name: measure_method(network, mesh, method, batches, data.train, steps)
            for name, method in measured.items()
        }
    results = {name: summary(method, values[name], layers, config.seed) for name, method in measured.items()}
    settings = {
        "model": model,
        "pivot_layer": network.heads.get("pivot_head", 0),
        "batches": number,
        "config": as_dict(config),
        "records": data.fingerprint,
        "versions": cli.versions(),
    }
    write_json(out / "interference.json", results | {"settings": settings})
    interference_by_layer(results, out / "interference.png")
    console.print(table(results))
    console.print(f"wrote {out}/interference.json and {out}/interference.png")
    return results | {"settings": settings}


def compared_methods() -> list[str]:
    """The names of the methods that have texts of their own to compare."""
    return [name for name, method in known_methods().items() if method.compared]


def load(config, reader, mesh, methods) -> decoder.Decoder:
    """The model as the training of these methods begins or goes on; a further head that the source has is
    used, and otherwise made from the main one."""
    methods = list(methods)
    heads = {head: layer for method in methods for head, layer in method.heads.items()}
    kinds = [lora for method in methods if (lora := find_lora(config, reader.config, method))]
    targets = tuple(dict.fromkeys(target for lora in kinds for target in lora.targets))
    lora = dataclasses.replace(kinds[0], targets=targets) if kinds else None
    exits = {layer for method in methods for layer in method.exits}
    split = {"heads": heads, "exits": exits, "lora": lora}
    # Blocks are gone through one by one, so that nothing inside them is worth keeping.
    compute = Compute(config.compute_dtype or models.default_compute_dtype(), "full", config.attention)
    compute.check_platform()
    model = decoder.abstract(reader.config, compute=compute, **split)
    reader = with_adapter(reader, lora, heads, config.seed)
    return decoder.with_params(model, weights.load_params(reader, mesh, dtype="float32", **split))


def measure_method(
    model: decoder.Decoder, mesh, method: Method, batches: Batches, records: Records, steps: list[int]
) -> np.ndarray:
    """Cosines of the batches at `steps`, float64 [batches, L]; says what memory they take."""

    def rows(step):
        batch = batches[step]
        parts = tuple(only(batch, batches, records, step, texts) for texts in method.compared)
        return sharding.place_rows(mesh, parts)

    compiled = inner_products.lower(model, rows(steps[0]), method=method).compile()
    needed = {name: size / 2**30 for name, size in budget.device_bytes(compiled).items()}
    console.print(
        f"memory    {method.name}: {sum(needed.values()):.2f} GiB a device (parameters and batches "
        f"{needed['state']:.2f}, temporary {needed['temporary']:.2f})"
    )
    steps = track(steps, f"measuring {method.name}", len(steps))
    return np.stack([cosines(compiled(model, rows(step))) for step in steps])


def table(results: dict) -> Table:
    """The cosines of the methods, side by side, in the last layers that both batches of a method reach."""
    last = sorted({entry["last_shared_layer"] for entry in results.values()})
    columns = (f"layer {layer} [95 %]" for layer in last)
    rows = Table("method", "gradients of", *columns, box=box.SIMPLE)
    for method, entry in results.items():
        rows.add_row(
            find_method(method).label,
            " · ".join(entry["compared"]),
            *(_with_interval(entry["layers"][layer - 1]) for layer in last),
        )
    return rows


def _with_interval(layer: dict) -> str:
    if layer["mean"] is None:
        return "none"
    low, high = layer["interval"]
    return f"{layer['mean']:.2f} [{low:.2f}, {high:.2f}]"


def main(argv=None):
    """Reads the command line and measures."""
    arguments = parse(argv)
    config, model = arguments.config, arguments.model or arguments.config.model
    measure(config, arguments.workdir, model, Path(arguments.out), arguments.methods, arguments.batches)


def parse(argv) -> argparse.Namespace:
    """The command line's arguments."""
    parser = cli.Parser("prom_jax.interference", __doc__)
    parser.add_run()
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="a folder for the results")
    add("--model", help="checkpoint to measure (default: that of the configuration)")
    add("--batches", metavar="N", type=cli.at_least(1), default=8, help="how many batches")
    methods = "which methods, with commas between"
    add("--methods", metavar="NAMES", type=cli.names, default=compared_methods(), help=methods)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.guard(main)
