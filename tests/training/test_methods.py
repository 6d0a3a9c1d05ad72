"""The objective and all its gradients against torch; what English reaches; packing."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from prom_jax.ops.attention import segment
from prom_jax.training.objective import Objective
from prom_jax.utils.errors import UserError
from tests.reference import gradients, hf_model, pack, random_examples, relative_errors, to_model, to_params

PIVOT = 3  # of 4 layers
TARGET, ENGLISH = random_examples(1, [20, 13, 17, 9, 24]), random_examples(2, [12, 15, 8])
PACKED = {"target": pack(TARGET, [[0, 1], [2, 3], [4]], 36), "english": pack(ENGLISH, [[0, 2], [1]], 24)}
UNPACKED = {
    "target": pack(TARGET, [[i] for i in range(5)], 24),
    "english": pack(ENGLISH, [[0], [1], [2]], 15),
}


def copied_head(hf):
    """The pivot head: a deep copy of the main one, moved a little so that a swap of the two would show."""
    head = copy.deepcopy(hf.lm_head)
    head.weight.data += 0.1 * torch.randn_like(head.weight)
    return head


def torch_sum(hf, examples, head, layer, norm, label_smoothing=0.0):
    """Sum of token losses at a layer through a head, one example at a time."""
    total = 0
    for tokens, weights in examples:
        states = []
        keep = lambda module, inputs, output, states=states: states.append(output)
        hook = hf.model.layers[layer - 1].register_forward_hook(keep)
        hf.model(torch.from_numpy(tokens)[None])
        hook.remove()
        hidden = hf.model.norm(states[0]) if norm else states[0]
        losses = functional.cross_entropy(
            head(hidden)[0, :-1],
            torch.from_numpy(tokens)[1:],
            reduction="none",
            label_smoothing=label_smoothing,
        )
        total += (losses * torch.from_numpy(weights)[:-1]).sum()
    return total


def torch_objective(hf, pivot_head, objective):
    """The losses of an update as its metrics name them, and the gradients in our layout."""
    count = lambda examples: sum(float(weights.sum()) for _, weights in examples)
    metrics = {"weight_target": count(TARGET), "weight_english": count(ENGLISH)}
    target = torch_sum(hf, TARGET, hf.lm_head, 4, norm=True)
    if objective.method == "prom":
        smoothing = objective.label_smoothing
        english = torch_sum(hf, ENGLISH, pivot_head, PIVOT, objective.norm == "final", smoothing)
        loss = target / count(TARGET) + objective.weight * english / count(ENGLISH)
    elif objective.method == "xllama2":
        english = torch_sum(hf, ENGLISH, hf.lm_head, 4, norm=True)
        loss = (target + english) / (count(TARGET) + count(ENGLISH))
    else:
        loss = target / count(TARGET)
    loss.backward()
    metrics |= {"loss": loss.item(), "loss_target": target.item() / count(TARGET)}
    if objective.uses_english:
        metrics["loss_english"] = english.item() / count(ENGLISH)
    else:
        metrics.pop("weight_english")
    tensors = {name: parameter.grad for name, parameter in hf.named_parameters()}
    if objective.has_pivot:
        tensors["pivot_head"] = pivot_head.weight.grad
    return metrics, to_params(tensors, PIVOT)


def assert_same(ours, theirs, tolerance):
    errors = {key: abs(float(ours[0][key]) / float(value) - 1) for key, value in theirs[0].items()}
    errors |= relative_errors(ours[1], theirs[1])
    worst = max(errors, key=errors.get)
    print(f"{worst}: {errors[worst]:.1e}")
    assert errors[worst] <= tolerance, worst


PROM = Objective("prom", weight=0.7, label_smoothing=0.1, chunk=16)
FINAL = dataclasses.replace(PROM, label_smoothing=0.3, norm="final")
BACTRIAN, XLLAMA2 = Objective("bactrian", chunk=16), Objective("xllama2", chunk=16)


def models(family, has_pivot=True):
    """Of transformers, its pivot head, and ours."""
    hf = hf_model(family, **({"sliding_window": 6} if family == "mistral" else {}))
    head = copied_head(hf)
    return hf, head, to_model(hf, PIVOT, head.weight if has_pivot else None)


@pytest.mark.parametrize(
    ("objective", "family"),
    [
        *itertools.product((PROM, FINAL), ("llama3", "smollm2")),  # untied, tied; both with grouped queries
        (XLLAMA2, "mistral"),
        (XLLAMA2, "smollm2"),
        (BACTRIAN, "llama3"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.method}-{x.norm}",
)
def test_losses_and_all_gradients_equal_torch(objective, family):
    hf, head, model = models(family, objective.has_pivot)
    ours, theirs = gradients(model, objective, PACKED), torch_objective(hf, head, objective)
    assert set(ours[0]) == set(theirs[0])
    assert_same(ours, theirs, tolerance=1e-4)


def test_packed_equals_unpacked():
    _, _, model = models("llama3")
    assert_same(gradients(model, PROM, PACKED), gradients(model, PROM, UNPACKED), tolerance=2e-5)


# Four examples of two kinds of prompt: (tokens, weights) of either side, and the tokens that they share.
KINDS = [np.arange(5, 12), np.arange(60, 66)]
PROMPTS = [np.concatenate([KINDS[i % 2], np.arange(100 + 9 * i, 104 + 8 * i)]) for i in range(4)]


def answered(seed):
    """The prompts, each with an answer of its own."""
    random = np.random.default_rng(seed)
    for prompt in PROMPTS:
        answer = random.integers(0, 199, random.integers(2, 9))
        weights = np.concatenate([np.zeros(len(prompt) - 1), np.ones(len(answer)), [0]])
        yield np.concatenate([prompt, answer]), weights.astype(np.float32)


def laid(parts, length):
    """A row of parts of examples: (example, its first place, its last, segment)."""
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "positions", "segments", "labels")}
    row["weights"] = np.zeros((1, length), np.float32)
    start = 0
    for (tokens, weights), first, end, number in parts:
        at, of = (0, slice(start, start + end - first)), slice(first, end)
        row["tokens"][at], row["weights"][at] = tokens[of], weights[of]
        row["positions"][at], row["labels"][at] = np.arange(first, end), np.append(tokens, 0)[1:][of]
        row["segments"][at] = number
        start += end - first
    return jax.tree.map(jnp.asarray, row)


def shared_rows(target, english, joined):
    """All in one row: what a kind begins with once, and where they are `joined` each prompt once for both
    sides, but for its last token, which predicts another one on either side."""

    def parts(examples, side):
        for i, example in enumerate(examples):
            first, common, end = len(KINDS[i % 2]), len(PROMPTS[i]) - 1, len(example[0])
            path = 1 + i % 2, 1 + i
            if joined and side == 2:
                yield example, common, end, segment(*path, side)
                continue
            if i < 2:
                yield example, 0, first, segment(path[0])
            yield example, first, common, segment(*path)
            yield example, common, end, segment(*path, side)

    return {"target": laid(parts(target, 1), 70), "english": laid(parts(english, 2), 70)}


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("objective", [PROM, XLLAMA2], ids=lambda objective: objective.method)
@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_shared_prompts_change_nothing(objective, joined, family):
    target, english = list(answered(0)), list(answered(1))
    alone = {
        "target": pack(target, [[i] for i in range(4)], 28),
        "english": pack(english, [[0, 1], [2, 3]], 56),
    }
    _, _, model = models(family, objective.has_pivot)
    shared = gradients(
        model, dataclasses.replace(objective, joined=joined), shared_rows(target, english, joined)
    )
    assert_same(shared, gradients(model, objective, alone), tolerance=2e-5)


@pytest.mark.parametrize("objective", [PROM, FINAL], ids=lambda objective: objective.norm)
def test_english_reaches_nothing_above_the_pivot(objective):
    _, _, model = models("llama3")
    no_target = dict(PACKED, target=jax.tree.map(jnp.zeros_like, PACKED["target"]))
    metrics, tree = gradients(model, objective, no_target)
    assert metrics["loss"] > 0 == metrics["loss_target"]
    assert not any(np.any(gradient) for gradient in (tree["lm_head"], *tree["upper"].values()))
    assert np.any(tree["norm"]) == (objective.norm == "final")
    for gradient in (tree["pivot_head"], tree["embed_tokens"], *tree["lower"].values()):
        assert np.any(gradient)


def test_zero_weight_is_bactrian_exactly():
    _, _, model = models("llama3", has_pivot=False)
    prom = gradients(model, dataclasses.replace(PROM, weight=0.0), PACKED)
    jax.tree.map(np.testing.assert_array_equal, prom, gradients(model, BACTRIAN, PACKED))


def test_bad_settings_are_refused():
    for settings, error in (
        ({"method": "sft"}, "method='sft': expected one of prom"),
        ({"norm": "layer"}, "pivot.norm='layer'"),
        ({"weight": -0.1}, "pivot.weight=-0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ):
        with pytest.raises(UserError, match=error):
            Objective(**settings)
