"""The command: its cosines against whole gradients from one device, its files, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import prom_jax
from prom_jax import interference as door
from prom_jax.checkpoints import params as weights
from prom_jax.checkpoints import pretrained as models
from prom_jax.data.loader import Batches
from prom_jax.data.records import Records
from prom_jax.models import decoder
from prom_jax.parallel.sharding import make_mesh
from prom_jax.training.methods.prom import PROM
from prom_jax.training.methods.xllama2 import XLLaMA2
from prom_jax.utils.errors import UserError
from tests.reference import gradients
from tests.tiny import tiny_config

PIVOT = 3  # three quarters of 4 layers


def config_of(tiny):
    config = tiny_config(tiny)
    config.batch.sequences = 2
    return config


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """An exported model whose pivot head is no copy of the main one."""
    reader, tokenizer = models.open_source(str(tiny / "model"))
    params = weights.load_params(reader, heads={"pivot_head": PIVOT})
    params["pivot_head"] = params["pivot_head"][::-1]
    model = decoder.abstract(reader.config, heads={"pivot_head": PIVOT})
    directory = tmp_path_factory.mktemp("interference") / "adapted"
    prom_jax.save_hf(decoder.with_params(model, params), tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def measured(tiny, adapted, tmp_path_factory):
    """Two batches, on the suite's eight devices: the work directory, the results and their folder."""
    folder = tmp_path_factory.mktemp("interference")
    methods = ["bactrian", "xllama2", "prom"]
    results = door.measure(config_of(tiny), folder / "run", str(adapted), folder / "out", methods, 2)
    return folder / "run", results, folder / "out"


def layer_gradients(model, method, batch):
    """Of an update: one vector a layer, float64 [N, P]."""
    tree = gradients(model, method, batch)[1]
    stacks = [[np.reshape(x, (len(x), -1)) for x in tree[name].values()] for name in ("stack0", "stack1")]
    return np.vstack([np.hstack(stack) for stack in stacks]).astype(np.float64)


@pytest.mark.parametrize("method", ["xllama2", "prom"])
def test_cosines_between_whole_gradients(tiny, adapted, measured, method):
    workdir, results, _ = measured
    config, (model, _) = config_of(tiny), prom_jax.load(adapted)
    records = Records(workdir / "records" / results["settings"]["records"], "train")
    batch = Batches(records, sequences=2, seq_len=config.data.seq_len, seed=config.seed, epochs=1.0)[0]
    of_name = {"xllama2": XLLaMA2(), "prom": PROM(PIVOT, config.pivot.weight, config.pivot.label_smoothing)}
    silent = {side: rows | {"weights": 0 * rows["weights"]} for side, rows in batch.items()}
    english, target = (
        layer_gradients(model, of_name[method], silent | {side: batch[side]})
        for side in ("english", "target")
    )
    reached = {"xllama2": 4, "prom": PIVOT}[method]
    assert not english[reached:].any() and english[:reached].any(axis=1).all()
    for layer, entry in enumerate(results[method]["layers"]):
        if layer < reached:
            sizes = np.linalg.norm(english[layer]) * np.linalg.norm(target[layer])
            assert entry["values"][0] == pytest.approx(english[layer] @ target[layer] / sizes, abs=1e-5)
        else:
            assert entry == {"layer": layer + 1, "mean": None, "interval": None, "values": None}


@pytest.mark.slow
def test_cosines_of_adapters_are_those_of_the_trained_part(tiny, measured):
    workdir, results, out = measured
    config = config_of(tiny)
    config.adapter.kind, config.adapter.rank = "lora", 4
    ours = door.measure(config, workdir, config.model, out.with_name("lora"), ["prom"], 1)
    reader, _ = models.open_source(config.model)
    method = PROM(PIVOT, config.pivot.weight, config.pivot.label_smoothing, head="lora")
    model = door.load(config, reader, make_mesh(devices=jax.devices()[:1]), [method])
    records = Records(workdir / "records" / results["settings"]["records"], "train")
    batch = Batches(records, sequences=2, seq_len=config.data.seq_len, seed=config.seed, epochs=1.0)[0]
    silent = {side: rows | {"weights": 0 * rows["weights"]} for side, rows in batch.items()}
    english, target = (
        layer_gradients(model, method, silent | {side: batch[side]}) for side in ("english", "target")
    )
    for layer, entry in enumerate(ours["prom"]["layers"][:PIVOT]):
        sizes = np.linalg.norm(english[layer]) * np.linalg.norm(target[layer])
        assert entry["values"][0] == pytest.approx(english[layer] @ target[layer] / sizes, abs=1e-5)
        assert abs(entry["values"][0] - results["prom"]["layers"][layer]["values"][0]) > 1e-4


def test_files(measured):
    _, results, out = measured
    assert json.loads((out / "interference.json").read_text()) == results
    assert list(results) == ["bactrian", "xllama2", "prom", "settings"]
    for entry in results["bactrian"]["layers"]:
        low, high = entry["interval"]
        assert low < entry["mean"] < high and entry["mean"] == pytest.approx(np.mean(entry["values"]))
    assert (results["settings"]["pivot_layer"], results["settings"]["batches"]) == (PIVOT, 2)
    with Image.open(out / "interference.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10**6)}
    for method in ((44, 160, 44), (214, 39, 40), (31, 119, 180)):  # tab:green, tab:red, tab:blue
        assert method in colours


def test_a_head_is_made_where_there_is_none(tiny, measured):
    """As training begins with it: a copy of the main head. The baselines do not read it at all."""
    workdir, results, out = measured
    config = config_of(tiny)
    base = door.measure(config, workdir, config.model, out.with_name("base"), ["xllama2", "prom"], 2)
    values = lambda of, method: [layer["mean"] for layer in of[method]["layers"] if layer["mean"] is not None]
    assert values(base, "xllama2") == pytest.approx(values(results, "xllama2"), abs=1e-5)
    assert np.abs(np.subtract(values(base, "prom"), values(results, "prom"))).min() > 1e-4


@pytest.mark.parametrize(
    ("changes", "methods", "number", "message"),
    [
        ({}, ["prom", "sft"], 1, "--methods=prom,sft: expected some of bactrian,prom,xllama2"),
        ({}, [], 1, "--methods=: expected some of"),
        ({}, ["prom"], 99, "--batches=99: expected 1 to "),
        ({"pivot.layer": 2}, ["prom"], 1, "was trained for layer 3, but pivot.layer is 2"),
        ({"data.translation": ()}, ["prom", "bactrian"], 1, "leave bactrian out of --methods"),
    ],
)
def test_bad_input_is_refused(tiny, adapted, measured, changes, methods, number, message):
    config = config_of(tiny)
    config.update_from_flattened_dict(changes)
    workdir, _, out = measured
    with pytest.raises(UserError, match=message):
        door.measure(config, workdir, str(adapted), out.with_name("bad"), methods, number)


def test_the_command_needs_a_place_for_its_results():
    with pytest.raises(UserError, match="--out is missing: a folder for the results"):
        door.parse(["--config=configs/demo.py"])
