"""Adapters: losses and gradients beside peft on torch, and what an update leaves undone."""

import dataclasses

import jax
import jax.extend
import numpy as np
import peft
import pytest
import torch
from torch.nn import functional

from prom_jax.config import default
from prom_jax.data.loader import prefix_hashes
from prom_jax.models import decoder
from prom_jax.models.lora import LoRA, linear_maps
from prom_jax.training.methods.prom import PROM
from prom_jax.training.methods.xllama2 import XLLaMA2
from prom_jax.training.setup import find_lora
from prom_jax.training.step import split_params
from prom_jax.utils.errors import UserError
from tests.reference import gradients, hf_model, hf_name, place_params, to_model, to_params
from tests.training.test_methods import (
    BACTRIAN,
    ENGLISH,
    PACKED,
    PIVOT,
    TARGET,
    UNPACKED,
    assert_same,
    torch_sum,
)

RANK = 4
ADAPTED = PROM(PIVOT, weight=0.7, label_smoothing=0.1, head="lora")


def adapted(family, method, **settings):
    """A model of transformers with peft's adapters of random values, A and B of a head, and our model."""
    hf = hf_model(family)
    kind = {"r": RANK, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **kind))
    for name, parameter in hf.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    vocabulary, hidden = hf.lm_head.weight.shape
    head = {"A": torch.randn(RANK, hidden) / 8, "B": torch.randn(vocabulary, RANK) / 8}
    head = {f"pivot_head.lora_{part}.weight": x.requires_grad_() for part, x in head.items()}
    maps = {name.split(".")[-4] for name, _ in hf.named_parameters() if "lora_A" in name}
    targets = (*sorted(maps), *method.low_rank_heads)
    lora = LoRA(RANK, 6.0, targets, rslora=kind.get("use_rslora", False))
    exits = set(method.exits) - {PIVOT} | ({PIVOT} if method.exits else set())
    model = to_model(hf, PIVOT * bool(exits), lora=lora, low_rank=head if method.low_rank_heads else None)
    return hf, head, model


def torch_loss(hf, head, model, method):
    """The losses of an update and the gradients of all that is trained, in our layout."""

    def low_rank(hidden):
        down, up = head.values()
        weight = hf.lm_head.weight.detach() + model.lora.scale * up @ down
        return functional.linear(hidden, weight)

    last = hf.lm_head, hf.config.num_hidden_layers, True
    counts = {"target": TARGET, "english": ENGLISH}
    counts = {stream: sum(float(w.sum()) for _, w in examples) for stream, examples in counts.items()}
    sums = {"target": torch_sum(hf, TARGET, *last)}
    if isinstance(method, PROM):
        sums["english"] = torch_sum(hf, ENGLISH, low_rank, PIVOT, False, method.label_smoothing)
        loss = method.weight * sums["english"] / counts["english"] + sums["target"] / counts["target"]
    elif isinstance(method, XLLaMA2):
        sums["english"] = torch_sum(hf, ENGLISH, *last)
        loss = sum(sums.values()) / sum(counts.values())
    else:
        loss = sums["target"] / counts["target"]
    metrics = {"loss": loss.item()}
    for stream, total in sums.items():
        metrics |= {f"loss_{stream}": total.item() / counts[stream], f"weight_{stream}": counts[stream]}
    tensors = {hf_name(name): x for name, x in hf.named_parameters() if "lora_" in name}
    tensors |= head if method.low_rank_heads else {}
    found = torch.autograd.grad(loss, list(tensors.values()))
    return metrics, to_params(dict(zip(tensors, found)), model.config, model.exits, (), model.lora)


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        (ADAPTED, "llama3", {}),
        pytest.param(XLLaMA2(), "smollm2", {"use_rslora": True}, marks=pytest.mark.slow),
        pytest.param(BACTRIAN, "llama3", {"target_modules": ["q_proj", "down_proj"]}, marks=pytest.mark.slow),
        pytest.param(ADAPTED, "phi3", {}, marks=pytest.mark.slow),  # q, k and v are one matrix
        pytest.param(ADAPTED, "gemma3", {}, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_losses_and_all_gradients_equal_peft(method, family, settings):
    hf, head, model = adapted(family, method, **settings)
    ours, theirs = gradients(model, method, PACKED), torch_loss(hf, head, model, method)
    assert set(ours[0]) == set(theirs[0])
    assert jax.tree.structure(ours[1]) == jax.tree.structure(theirs[1])
    assert_same(ours, theirs, tolerance=1e-4)


@pytest.mark.slow
def test_adapters_on_a_mesh_equal_one_device():
    _, _, model = adapted("llama3", ADAPTED)
    batch = jax.tree.map(lambda x: np.pad(x, [(0, -len(x) % 8), (0, 0)]), PACKED)
    one = gradients(model, ADAPTED, batch)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        params = place_params(mesh, decoder.to_params(model), model.config, model.lora)
        several = gradients(decoder.with_params(model, params), ADAPTED, batch, accumulation=2)
    assert_same(jax.device_get(several), jax.device_get(one), tolerance=2e-5)


def products(jaxpr):
    """The shapes of all matrix products in a jaxpr and what is in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_no_gradient_of_a_frozen_matrix_is_made():
    """Such a gradient is a product of the matrix's shape. Those that are trained have theirs."""
    _, _, model = adapted("llama3", ADAPTED)
    trained, frozen = split_params(decoder.to_params(model), model, ADAPTED)

    def shapes(params):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return {x.shape[1:] if len(path) > 1 else x.shape for path, x in leaves if x.ndim > 1}

    made = set(products(jax.make_jaxpr(lambda: gradients(model, ADAPTED, PACKED))().jaxpr))
    whole = to_model(hf_model("llama3"), PIVOT, hf_model("llama3").lm_head.weight)
    own = PROM(PIVOT, weight=0.7)
    made_of_whole = set(products(jax.make_jaxpr(lambda: gradients(whole, own, PACKED))().jaxpr))
    joined = {(128 + 2 * 32, 64), (2 * 96, 64)}  # q, k and v, gate and up: by one product (`ops.linear`)
    assert joined | {(64, 128), (64, 96), (199, 64)} <= made_of_whole
    assert not made & (joined | shapes(frozen))
    assert {(199, RANK), (RANK, 96)} <= made & shapes(trained)
    assert {(RANK, 128), (RANK, 96)} <= made and (128, RANK) in shapes(trained)  # of B transposed


def with_keys(rows, salt):
    """Rows with the keys of dropout that the loader gives them."""
    keys = np.zeros(rows["tokens"].shape, np.uint32)
    tokens, segments = np.asarray(rows["tokens"]), np.asarray(rows["segments"])
    for row, number in {(i, n) for i in range(len(keys)) for n in segments[i].tolist() if n}:
        here = (row, segments[row] == number)
        keys[here] = prefix_hashes(tokens[here]) ^ np.uint32(salt)
    return rows | {"keys": keys}


@pytest.mark.slow
def test_dropout_is_the_same_however_texts_are_packed_and_another_in_each_step():
    _, _, model = adapted("llama3", BACTRIAN)
    lora = dataclasses.replace(model.lora, dropout=0.3)
    params = decoder.to_params(model)
    model = decoder.with_params(decoder.abstract(model.config, compute=model.compute, lora=lora), params)

    def losses(batch, salt):
        return gradients(model, BACTRIAN, {"target": with_keys(batch["target"], salt)})

    packed, unpacked = losses(PACKED, 1), losses(UNPACKED, 1)
    assert_same(packed, unpacked, tolerance=2e-5)
    without = gradients(model, BACTRIAN, {"target": PACKED["target"]})  # as in evaluation
    others = [losses(PACKED, 2)[0]["loss"], without[0]["loss"]]
    assert min(abs(float(other / packed[0]["loss"]) - 1) for other in others) > 1e-3


def config_of(**settings):
    config = default()
    for key, value in settings.items():
        config.adapter[key] = value
    return config


def test_what_a_configuration_asks_for():
    base = decoder.tensors(hf_config := to_model(hf_model("llama2")).config)
    maps = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert linear_maps(base) == maps
    own = dataclasses.replace(ADAPTED, head="own")
    assert find_lora(config_of(), hf_config, own) is None
    alone = find_lora(config_of(), hf_config, ADAPTED)
    assert alone.targets == ("pivot_head",) and alone.trains_base
    both = find_lora(config_of(kind="lora"), hf_config, ADAPTED)
    assert both.targets == (*maps, "pivot_head") and not both.trains_base and both.scale == 2
    some = find_lora(config_of(kind="lora", targets=("v_proj", "q_proj"), rslora=True), hf_config, own)
    assert some.targets == ("v_proj", "q_proj") and some.scale == 8
    with pytest.raises(UserError, match=r"'lm_head'.*expected 'all-linear' or some of q_proj"):
        find_lora(config_of(kind="lora", targets=("lm_head",)), hf_config, own)
    config = config_of(kind="lora")
    assert (
        PROM.from_config(config, 3, 0.1).head == "lora" and PROM.from_config(default(), 3, 0.1).head == "own"
    )
