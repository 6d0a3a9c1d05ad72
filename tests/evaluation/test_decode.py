"""Greedy decoding against transformers' generate, which gets the prompts one at a time and unpadded."""

import contextlib

import jax
import numpy as np
import pytest

from prom_jax.evaluation.decode import decode, greedy
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from tests.reference import generate, hf_model, place_params, to_model

NEW = 12
# On either side of the bucket of 64, and far longer than the window.
PROMPTS = [np.random.default_rng(length).integers(0, 199, length).tolist() for length in (1, 5, 23, 70)]
MODELS = {"smollm2": {}, "llama3": {}, "mistral": {"sliding_window": 6}}


@pytest.mark.parametrize(("family", "pivot_layer"), [("smollm2", 0), ("llama3", 3), ("mistral", 3)])
def test_greedy_equals_transformers(family, pivot_layer):
    hf = hf_model(family, **MODELS[family])
    model = to_model(hf, pivot_layer)
    expected = [generate(hf, prompt, NEW) for prompt in PROMPTS]
    assert len({token for new in expected for token in new}) > NEW  # not one token over and over
    assert greedy(model, PROMPTS, NEW, []) == expected

    # One prompt stops on the way, then another at once, and others where they meet these tokens.
    for eos in ([expected[1][4]], [expected[3][0]], [expected[1][4], expected[3][0]]):
        stopped = [generate(hf, prompt, NEW, eos) for prompt in PROMPTS]
        assert any(len(new) < NEW for new in stopped)
        assert greedy(model, PROMPTS, NEW, eos) == stopped


@pytest.mark.parametrize(
    ("family", "pivot_layer"), [("llama2", 0), pytest.param("mistral", 3, marks=pytest.mark.slow)]
)
def test_prompts_that_share_their_beginning(family, pivot_layer, monkeypatch):
    hf = hf_model(family, **MODELS.get(family, {}))
    chance = np.random.default_rng(1)
    beginning = chance.integers(0, 199, 290).tolist()  # more than a part of the prefill
    prompts = [beginning + chance.integers(0, 199, length).tolist() for length in (1, 9, 3, 30, 2)]
    prompts += [prompts[1], prompts[0][:291], *PROMPTS]
    expected = [generate(hf, prompt, NEW) for prompt in prompts]
    assert len({tuple(new) for new in expected[:5]}) == 5
    model = to_model(hf, pivot_layer)
    assert greedy(model, prompts, NEW, []) == expected
    monkeypatch.setattr("prom_jax.evaluation.decode.GROWTH", 5)  # so that the cache grows
    assert dict(decode(model, prompts, NEW, [], slots=1)) == dict(enumerate(expected))  # row by row
    eos = [expected[0][3], expected[3][5]]
    assert greedy(model, prompts, NEW, eos) == [generate(hf, prompt, NEW, eos) for prompt in prompts]


def test_watching_from_outside():
    model = to_model(hf_model("smollm2"))
    whole = dict(decode(model, PROMPTS, NEW, []))
    seen = {number: [] for number in range(len(PROMPTS))}

    def watch(number, answer):
        seen[number].append(answer)
        return number == 2 and len(answer) >= 5

    watched = dict(decode(model, PROMPTS, NEW, [], watch=watch, chunk=4))
    for number, answer in seen.items():
        assert all(part == whole[number][: len(part)] for part in answer)
    assert [len(part) for part in seen[0]] == [1, 5, 9, 12]
    assert watched == whole | {2: whole[2][:5]}
    # A stop token is the answer's last, and ends it alone.
    stop = whole[1][2]
    assert dict(decode(model, PROMPTS[1:2], NEW, [stop]))[0] == whole[1][: whole[1].index(stop) + 1]


@pytest.mark.parametrize(
    ("sizes", "context"),
    [({"fsdp": 8}, jax.set_mesh), ({"data": 2, "fsdp": 2, "tensor": 2}, contextlib.nullcontext)],
)
def test_greedy_on_a_mesh(sizes, context):
    hf = hf_model("smollm2")
    mesh = sharding.make_mesh(**sizes)
    model = to_model(hf, pivot_layer=3)
    model = decoder.with_params(model, place_params(mesh, decoder.to_params(model), model.config))
    prompts = PROMPTS[:3]  # rows that its devices do not divide
    with context(mesh):
        assert greedy(model, prompts, NEW, []) == [generate(hf, prompt, NEW) for prompt in prompts]
