"""The objective and all its gradients against torch; what English reaches; packing."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.ops.attention import segment_id
from prom_jax.training.methods import find_method, known_methods
from prom_jax.training.methods.bactrian import Bactrian
from prom_jax.training.methods.deep_supervision import DeepSupervision
from prom_jax.training.methods.english_last import EnglishLast
from prom_jax.training.methods.pcgrad import PCGrad
from prom_jax.training.methods.prom import PROM
from prom_jax.training.methods.xllama2 import XLLaMA2
from prom_jax.training.objective import L
from prom_jax.training.step import make_term_norms, make_update, merge_params, split_params
from prom_jax.utils.errors import UserError
from tests.reference import (
    gradients,
    hf_logits,
    hf_model,
    pack,
    random_examples,
    relative_errors,
    short_window,
    to_model,
    to_params,
)

PIVOT = 3  # of 4 layers
TARGET, ENGLISH = random_examples(1, [20, 13, 17, 9, 24]), random_examples(2, [12, 15, 8])
CONVERSION = random_examples(3, [11, 7])
PACKED = {"target": pack(TARGET, [[0, 1], [2, 3], [4]], 36), "english": pack(ENGLISH, [[0, 2], [1]], 24)}
CONVERTED = PACKED | {"conversion": pack(CONVERSION, [[0, 1]], 18)}
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
            hf_logits(hf, hidden, head)[0, :-1],
            torch.from_numpy(tokens)[1:],
            reduction="none",
            label_smoothing=label_smoothing,
        )
        total += (losses * torch.from_numpy(weights)[:-1]).sum()
    return total


def fixed(head):
    """A head that is read and does not learn."""
    return lambda hidden: functional.linear(hidden, head.weight.detach(), head.bias)


def torch_parts(hf, pivot_head, method, **streams):
    """Of each stream: what it adds to the loss, the sum of its token losses, and their number."""
    examples = {"target": TARGET, "english": ENGLISH, "conversion": CONVERSION} | streams
    counts = {stream: sum(float(weights.sum()) for _, weights in examples[stream]) for stream in examples}

    def mean(stream, *where, weight=1.0, of=()):
        total = torch_sum(hf, examples[stream], *where)
        return weight * total / sum(counts[s] for s in of or (stream,)), total, counts[stream]

    last = (hf.lm_head, hf.config.num_hidden_layers, True)
    if isinstance(method, DeepSupervision):
        return {
            "target": mean("target", *last),
            "english": mean("english", hf.lm_head, method.middle, True),
            "conversion": mean("conversion", fixed(hf.lm_head), 1, True),
        }
    if isinstance(method, XLLaMA2):
        return {stream: mean(stream, *last, of=("target", "english")) for stream in ("target", "english")}
    if isinstance(method, PROM):
        head = {"own": pivot_head, "frozen": fixed(pivot_head), "shared": hf.lm_head}[method.head]
        exit = last if isinstance(method, EnglishLast) else (head, method.layer, method.norm == "final")
        english = mean("english", *exit, method.label_smoothing, weight=method.weight)
        return {"target": mean("target", *last), "english": english}
    return {"target": mean("target", *last)}


def torch_gradients(hf, pivot_head, loss):
    """By transformers' names, and 'pivot_head'; 0 for what the loss does not reach."""
    tensors = dict(hf.named_parameters()) | {"pivot_head": pivot_head.weight}
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), found)
    }


def projected(one, other):
    """Gradients without what conflicts with others, block by block, on one flat vector each."""
    result = dict(one)
    block_of = lambda name: tuple(name.split(".")[:3]) if ".layers." in name else name
    for block in {block_of(name) for name in one}:
        names = [name for name in one if block_of(name) == block]
        a, b = (torch.cat([side[name].flatten() for name in names]) for side in (one, other))
        if a @ b < 0:
            a = a - (a @ b) / (b @ b) * b
        for name, part in zip(names, a.split([one[name].numel() for name in names])):
            result[name] = part.view_as(one[name])
    return result


def torch_loss(hf, pivot_head, method, **streams):
    """The losses of an update as its metrics name them, and the gradients in our layout.

    `streams` are examples in place of those of all tests.
    """
    parts = torch_parts(hf, pivot_head, method, **streams)
    metrics = {"loss": sum(part.item() for part, *_ in parts.values())}
    for stream, (_, total, count) in parts.items():
        metrics |= {f"loss_{stream}": total.item() / count, f"weight_{stream}": count}
    if isinstance(method, PCGrad):
        english, target = (
            torch_gradients(hf, pivot_head, parts[stream][0]) for stream in ("english", "target")
        )
        sides = projected(english, target), projected(target, english)
        tensors = {name: sides[0][name] + sides[1][name] for name in english}
        assert (
            len({torch.equal(sides[0][name], english[name]) for name in english}) == 2
        )  # some blocks conflict
    else:
        tensors = torch_gradients(hf, pivot_head, sum(part for part, *_ in parts.values()))
    config = config_from_hf(hf.config.to_dict())
    heads = [head for head in method.heads if method.trains((head,))]
    return metrics, to_params(tensors, config, method.exits or [PIVOT], heads)


def assert_same(ours, theirs, tolerance):
    errors = {key: abs(float(ours[0][key]) / float(value) - 1) for key, value in theirs[0].items()}
    errors |= relative_errors(ours[1], theirs[1])
    worst = max(errors, key=errors.get)
    print(f"{worst}: {errors[worst]:.1e}")
    assert errors[worst] <= tolerance, worst


RAW = PROM(PIVOT, weight=0.7, label_smoothing=0.1)
FINAL = dataclasses.replace(RAW, label_smoothing=0.3, norm="final")
FROZEN, SHARED_FINAL = dataclasses.replace(RAW, head="frozen"), dataclasses.replace(FINAL, head="shared")
LAST = EnglishLast(PIVOT, weight=0.7)
DEEP = DeepSupervision(PIVOT)
BACTRIAN, XLLAMA2, PCGRAD = Bactrian(), XLLaMA2(), PCGrad()


def id_of(x):
    return x if isinstance(x, str) else f"{x.name}-{getattr(x, 'norm', '')}-{getattr(x, 'head', '')}"


def models(family, has_pivot=True, more_exits=()):
    """Of transformers, its pivot head, and ours."""
    hf = hf_model(family, **short_window(family))
    head = copied_head(hf)
    return hf, head, to_model(hf, PIVOT, head.weight if has_pivot else None, more_exits=more_exits)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *itertools.product((RAW, FINAL), ("llama3", "smollm2")),  # untied, tied; both with grouped queries
        (FINAL, "qwen2"),
        (RAW, "qwen3"),
        (XLLAMA2, "mistral"),
        (XLLAMA2, "smollm2"),
        (XLLAMA2, "qwen2 with windows"),
        (BACTRIAN, "llama3"),
        (RAW, "llama with biases"),
        (FINAL, "olmo2"),
        (FINAL, "gemma2"),
        (RAW, "gemma3"),
        (FINAL, "smollm3"),
        (RAW, "granite"),
        (FROZEN, "smollm2"),
        (SHARED_FINAL, "gemma3"),
        (LAST, "llama3"),
        (DEEP, "smollm2"),
        (PCGRAD, "llama3"),
    ],
    ids=id_of,
)
def test_losses_and_all_gradients_equal_torch(method, family):
    hf, head, model = models(family, bool(method.heads), method.exits)
    batch = CONVERTED if "conversion" in method.streams else PACKED
    ours, theirs = gradients(model, method, batch), torch_loss(hf, head, method)
    assert set(ours[0]) == set(theirs[0])
    assert_same(ours, theirs, tolerance=1e-4)
    trained, _ = split_params(decoder.to_params(model), model, method)
    assert jax.tree.structure(ours[1]) == jax.tree.structure(trained)


def test_norms_of_the_parts_of_a_gradient():
    hf, head, model = models("llama3")
    parts = torch_parts(hf, head, RAW)
    batch = jax.tree.map(lambda x: jnp.pad(x, [(0, len(x) % 2), (0, 0)]), PACKED)
    chunks = dict.fromkeys(RAW.streams, 16)
    norms = jax.jit(make_term_norms(model, RAW, 2, chunks=chunks))(decoder.to_params(model), batch)
    assert set(norms) == set(parts)
    for stream, (part, *_) in parts.items():
        of_all = torch.cat([x.flatten() for x in torch_gradients(hf, head, part).values()])
        assert norms[stream] == pytest.approx(of_all.norm().item(), rel=1e-4), stream


def test_packed_equals_unpacked():
    _, _, model = models("llama3")
    assert_same(gradients(model, RAW, PACKED), gradients(model, RAW, UNPACKED), tolerance=2e-5)


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
                yield example, common, end, segment_id(*path, side)
                continue
            if i < 2:
                yield example, 0, first, segment_id(path[0])
            yield example, first, common, segment_id(*path)
            yield example, common, end, segment_id(*path, side)

    return {"target": laid(parts(target, 1), 70), "english": laid(parts(english, 2), 70)}


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("method", [RAW, XLLAMA2], ids=id_of)
@pytest.mark.parametrize("family", [pytest.param("llama3", marks=pytest.mark.slow), "mistral"])
def test_shared_prompts_change_nothing(method, joined, family):
    target, english = list(answered(0)), list(answered(1))
    alone = {
        "target": pack(target, [[i] for i in range(4)], 28),
        "english": pack(english, [[0, 1], [2, 3]], 56),
    }
    _, _, model = models(family, bool(method.heads))
    rows = shared_rows(target, english, joined)
    shared = gradients(model, method, rows, appended="english" if joined else None)
    assert_same(shared, gradients(model, method, alone), tolerance=2e-5)


@pytest.mark.parametrize("method", [RAW, FINAL], ids=id_of)
def test_english_reaches_nothing_above_the_pivot(method):
    _, _, model = models("llama3")
    no_target = dict(PACKED, target=jax.tree.map(jnp.zeros_like, PACKED["target"]))
    metrics, tree = gradients(model, method, no_target)
    assert metrics["loss"] > 0 == metrics["loss_target"]
    assert not any(np.any(gradient) for gradient in (tree["lm_head"], *tree["stack1"].values()))
    assert np.any(tree["norm"]) == (method.norm == "final")
    for gradient in (tree["pivot_head"], tree["embed_tokens"], *tree["stack0"].values()):
        assert np.any(gradient)


def test_zero_weight_is_bactrian_exactly():
    _, _, model = models("llama3", has_pivot=False)
    prom = gradients(model, dataclasses.replace(RAW, weight=0.0), PACKED)
    jax.tree.map(np.testing.assert_array_equal, prom, gradients(model, BACTRIAN, PACKED))


def test_bad_settings_are_refused():
    for settings, error in (
        ({"norm": "layer"}, "pivot.norm='layer'"),
        ({"head": "tied"}, "pivot.head='tied': expected one of own, lora, frozen, shared"),
        ({"weight": -0.1}, "pivot.weight=-0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ):
        with pytest.raises(UserError, match=error):
            PROM(PIVOT, **settings)
    with pytest.raises(UserError, match="method='sft': expected one of bactrian, deep_supervision, "):
        find_method("sft")


def test_methods_are_known_by_their_files():
    for name, method in known_methods().items():
        assert method.name == name
        assert method.label and method.colour and len(method.compared) in (0, 2)
    for one in ("label", "colour"):
        assert len({getattr(method, one) for method in known_methods().values()}) == len(known_methods())


# Methods that are not in the package, as someone may add them.


@dataclasses.dataclass(frozen=True)
class Combined(PROM):
    """PROM whose gradients are combined by a function, here their sum."""

    def combine(self, gradients):
        assert set(gradients) == {"english", "target"}
        return jax.tree.map(jnp.add, gradients["english"], gradients["target"])


@dataclasses.dataclass(frozen=True)
class HeadOnly(PROM):
    """PROM that trains the pivot head alone."""

    def trains(self, path):
        return path == ("pivot_head",)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_combined_gradients_are_those_of_each_sum(accumulation):
    _, _, model = models("llama3")
    batch = {
        stream: jax.tree.map(lambda x: jnp.pad(x, [(0, -len(x) % 2), (0, 0)]), rows)
        for stream, rows in PACKED.items()
    }
    settings = {"weight": RAW.weight, "label_smoothing": RAW.label_smoothing}
    combined = gradients(model, Combined(PIVOT, **settings), batch, accumulation)
    assert_same(combined, gradients(model, RAW, batch), tolerance=2e-5)


def test_parameters_that_are_not_trained_stay_and_have_no_state():
    _, _, model = models("llama3")
    method = HeadOnly(PIVOT, weight=0.7)
    optimizer = optax.adam(0.1)
    params = decoder.to_params(model)
    trained, frozen = split_params(params, model, method)
    state = optimizer.init(trained)
    assert [x.shape for x in jax.tree.leaves(state)] == [(), *2 * [params["pivot_head"].shape]]
    update = jax.jit(make_update(model, method, optimizer, 1, chunks={"english": 16, "target": 16}))
    after, _, metrics = update(trained, state, PACKED, frozen)
    assert set(after) == {"pivot_head"} and merge_params(after, frozen).keys() == params.keys()
    head = gradients(model, RAW, PACKED)[1]["pivot_head"]
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(head), rel=1e-5)
    assert (after["pivot_head"] != params["pivot_head"]).any()


@dataclasses.dataclass(frozen=True)
class Replayed(PROM):
    """PROM with a third stream, which leaves after another block through the main head."""

    @property
    def loss(self):
        return super().loss + 0.3 * L("replay", layer=2)


@pytest.mark.parametrize("appended", [pytest.param(None, marks=pytest.mark.slow), "english"])
def test_a_third_stream_is_a_term(appended):
    """Its loss is added; those of the others stay."""
    target, english = list(answered(0)), list(answered(1))
    hf = hf_model("llama3")
    head = copied_head(hf)
    model = to_model(hf, PIVOT, head.weight, more_exits=(2,))
    method = Replayed(PIVOT, weight=0.7, label_smoothing=0.1)
    assert method.streams == ("target", "english", "replay") and method.exits == (2, PIVOT)
    batch = shared_rows(target, english, joined=appended is not None) | {"replay": PACKED["english"]}
    both, _ = gradients(model, method, batch, appended=appended)
    without, _ = gradients(model, RAW, batch, appended=appended)
    replay = torch_sum(hf, ENGLISH, hf.lm_head, 2, norm=True).item() / float(both["weight_replay"])
    assert both["loss_replay"] == pytest.approx(replay, rel=1e-5)
    assert both["loss"] == pytest.approx(float(without["loss"]) + 0.3 * replay, rel=1e-5)
    for key in ("loss_target", "loss_english"):
        assert both[key] == pytest.approx(float(without[key]), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Twice(PROM):
    """PROM whose English leaves a second time, which would have a sum of the same name."""

    @property
    def loss(self):
        return super().loss + L("english")


def test_a_stream_is_in_one_term():
    with pytest.raises(ValueError, match=r"\['english'\] are in two terms of 'prom'"):
        _ = Twice(PIVOT).streams
    nested = L("target") + (0.5 * (L("english") + L("replay")))
    assert [(term.streams, term.weight) for term in nested.terms] == [
        (("target",), 1.0),
        (("english",), 0.5),
        (("replay",), 0.5),
    ]
