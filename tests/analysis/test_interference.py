"""Cosines against the gradients of whole batches; which texts are compared; memory; meshes."""

import copy
import json
import math

import jax
import numpy as np
import pytest

from prom_jax.analysis.interference import cosines, draw, inner_products, only, summary
from prom_jax.data.examples import Recipe
from prom_jax.data.loader import Batches
from prom_jax.data.records import prepare
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from prom_jax.training.methods import find_method, known_methods
from prom_jax.training.methods.bactrian import Bactrian
from prom_jax.training.methods.prom import PROM
from prom_jax.training.methods.xllama2 import XLLaMA2
from prom_jax.utils.errors import UserError
from tests.reference import gradients, hf_model, pack, place_params, random_examples, to_model

PIVOT = 3  # of 4 layers
# Few different tokens, so that gradients have something in common.
FIRST = random_examples(1, [20, 13, 17, 9, 24, 30, 8, 5], vocabulary=8)
SECOND = random_examples(2, [12, 15, 8, 14], vocabulary=8)
ROWS = {
    "target": pack(FIRST, [[0, 1], [2, 3], [4, 6], [5]], 40),
    "english": pack(SECOND, [[0, 2], [1, 3]], 32),
}


COMPARED = {name: method for name, method in known_methods().items() if method.compared}
METHODS = {
    "bactrian": Bactrian(),
    "xllama2": XLLaMA2(),
    "prom": PROM(PIVOT, weight=0.7),
    "prom, final norm": PROM(PIVOT, weight=0.7, norm="final"),
}


def model_of(family, method, **settings):
    """In two stacks, with a pivot head that differs from the main one and that PROM alone must read; for
    Bactrian+(t) in one stack."""
    hf = hf_model(family, **settings)
    head = copy.deepcopy(hf.lm_head).weight
    head.data = head.data + 0.1
    return to_model(hf, *(() if method.name == "bactrian" else (PIVOT, head)), remat="full")


def parts(method):
    """Two batches: of either language, or for Bactrian+(t) of one, where other examples bear loss in each."""
    if method.name != "bactrian":
        return ("english", "target"), (ROWS["english"], ROWS["target"])
    segments = ROWS["target"]["segments"]
    keep = lambda segment: ROWS["target"] | {"weights": ROWS["target"]["weights"] * (segments == segment)}
    return ("target", "target"), (keep(1), keep(2))


def layers_of(tree):
    """The gradient of each layer's parameters as one vector, [N, P] float64."""
    stacks = [tree[name].values() for name in ("stack0", "stack1") if name in tree]
    flat = [np.hstack([np.reshape(x, (len(x), -1)) for x in stack]) for stack in stacks]
    return np.vstack(flat).astype(np.float64)


def whole(model, method, sides, rows):
    """Cosines from two full gradient trees of an update, in which one batch or the other bears no loss."""
    silent = {side: of_side | {"weights": 0 * of_side["weights"]} for side, of_side in ROWS.items()}
    alone = [silent | {side: part} for side, part in zip(sides, rows)]
    trees = [layers_of(gradients(model, method, batch)[1]) for batch in alone]
    norms = [np.linalg.norm(tree, axis=1) for tree in trees]
    with np.errstate(invalid="ignore"):
        return (trees[0] * trees[1]).sum(axis=1) / (norms[0] * norms[1])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("bactrian", "llama3"),
        ("xllama2", "smollm2"),
        ("prom", "llama3"),
        ("prom, final norm", "smollm2"),
        ("xllama2", "qwen2 with windows"),
    ],
)
def test_equals_whole_gradients(name, family):
    method = METHODS[name]
    window = {"sliding_window": 6} if "windows" in family else {}
    model, (sides, rows) = model_of(family, method, **window), parts(method)
    ours = cosines(inner_products(model, rows, method=method))
    theirs = whole(model, method, sides, rows)
    reached = PIVOT if method.name == "prom" else 4
    assert len(ours) == reached and np.isnan(theirs[reached:]).all()
    np.testing.assert_allclose(ours, theirs[:reached], atol=1e-5)
    assert np.ptp(ours) > 0.02  # so that the tolerance says something


@pytest.mark.parametrize(
    ("name", "sizes"), [("prom", {"data": 2, "fsdp": 2, "tensor": 2}), ("xllama2", {"fsdp": 8})]
)
def test_a_mesh_equals_one_device(name, sizes):
    method = METHODS[name]
    model, (_, rows) = model_of("llama3", method), parts(method)
    alone = cosines(inner_products(model, rows, method=method))
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        spread = decoder.with_params(model, place_params(mesh, decoder.to_params(model), model.config))
        placed = sharding.place_rows(mesh, jax.tree.map(np.asarray, rows))
        np.testing.assert_allclose(cosines(inner_products(spread, placed, method=method)), alone, atol=1e-5)


@pytest.mark.parametrize("name", COMPARED)
def test_no_gradient_tree_is_ever_in_memory(name):
    method = METHODS[name]
    model = model_of("llama3", method, num_hidden_layers=24)
    _, rows = parts(method)
    rows = jax.tree.map(lambda x: x[:1, :16], rows)
    compiled = inner_products.lower(model, rows, method=method).compile()
    params = decoder.to_params(model)
    tree = sum(x.nbytes for stack in ("stack0", "stack1") for x in params.get(stack, {}).values())
    assert compiled.memory_analysis().temp_size_in_bytes < tree / 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interference")
    for language in ("en", "sw"):
        rows = [
            {"instruction": f"{language} {i}", "output": language * (1 + i % 7 * len(language))}
            for i in range(30)
        ]
        (folder / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mt.tsv").write_text("en\tsw\n" + "".join(f"One {i}\tMoja {i}\n" for i in range(4)))
    return folder


def prepared(folder, tokenizer, **changes):
    english, target = (str(folder / f"{language}.jsonl") for language in ("en", "sw"))
    recipe = {"english": (english,), "target": (target,), "translation": (str(folder / "mt.tsv"),)}
    return prepare(Recipe("sw", **recipe | {"seq_len": 256} | changes), tokenizer, folder / "records")


def batches_of(data):
    return Batches(data.train, sequences=1, seq_len=256, seed=0, epochs=1.0)


def test_what_bears_loss_is_what_is_compared(folder, byte_level):
    data = prepared(folder, byte_level, translation_source=True)
    batches, counts = batches_of(data), data.report["train"]
    expected = {
        "bactrian": (("target",), ("translation",)),
        "xllama2": (("english",), ("target", "translation")),
        "prom": (("english", "translation_source"), ("target", "translation")),
    }
    assert expected.keys() == COMPARED.keys()
    for name, method in COMPARED.items():
        for texts, roles in zip(method.compared, expected[name], strict=True):
            found = 0
            for step in range(len(batches)):
                whole = batches[step]
                rows = only(whole, batches, data.train, step, texts)
                assert (rows["weights"] <= whole[texts.stream]["weights"]).all()
                assert (rows["tokens"] == whole[texts.stream]["tokens"]).all()
                found += rows["weights"].sum()
            assert found == sum(counts[role]["loss_tokens"] for role in roles)


def test_drawn_batches_hold_everything(folder, byte_level):
    data = prepared(folder, byte_level)
    batches = batches_of(data)
    methods = list(COMPARED.values())
    everything = [texts for method in methods for texts in method.compared]
    holds = [
        all(only(batches[step], batches, data.train, step, texts)["weights"].any() for texts in everything)
        for step in range(len(batches))
    ]
    good = np.flatnonzero(holds).tolist()
    assert 2 <= len(good) < len(batches)
    assert draw(batches, data.train, methods, len(good)) == good
    assert draw(batches, data.train, methods, 2) == good[:2]
    for number in (0, len(good) + 1):
        with pytest.raises(UserError, match=f"--batches={number}: expected 1 to {len(good)}, "):
            draw(batches, data.train, methods, number)


@pytest.mark.parametrize(
    ("changes", "method", "missing"),
    [
        ({"translation": ()}, "bactrian", "none of the translations: set data.translation"),
        ({"english": (), "streams": ("target",)}, "xllama2", "none of the English: set data.english"),
    ],
)
def test_data_without_what_is_compared_are_refused(folder, byte_level, changes, method, missing):
    data = prepared(folder, byte_level, **changes)
    with pytest.raises(UserError, match=f"method '{method}' .* {missing}, or leave {method} out"):
        draw(batches_of(data), data.train, [find_method(method)], 1)


def test_summary():
    values = np.array([[0.1, -0.5], [0.3, -0.5], [0.2, -0.5]])
    entry = summary(PROM, values, num_layers=3, seed=0)
    assert entry["compared"] == ["English", "target"] and entry["last_shared_layer"] == 2
    first, second, third = entry["layers"]
    assert first["mean"] == pytest.approx(0.2) and first["values"] == [0.1, 0.3, 0.2]
    low, high = first["interval"]
    assert 0.1 <= low < 0.2 < high <= 0.3
    assert second["interval"] == pytest.approx([-0.5, -0.5])
    assert third == {"layer": 3, "mean": None, "interval": None, "values": None}
