"""Log-probabilities of continuations against plain torch, one pair at a time."""

import numpy as np
import pytest
import torch

from prom_jax.evaluation.score import score
from prom_jax.models import decoder
from prom_jax.parallel import sharding
from tests.reference import hf_model, place_params, to_model

chance = np.random.default_rng(0)
CONTEXT = chance.integers(0, 199, 300).tolist()  # longer than a part of the prefill
some = lambda length: chance.integers(0, 199, length).tolist()
PAIRS = [
    *((CONTEXT, some(length)) for length in (1, 1, 4, 40)),  # four answers to one question
    (some(1), some(90)),
    (some(7), some(1)),
    (CONTEXT[:50], some(3)),
]


def expected(hf, context, continuation):
    with torch.no_grad():
        logits = hf(torch.tensor([context + continuation[:-1]])).logits[0, -len(continuation) :]
    logs = torch.log_softmax(logits.double(), -1)
    labels = torch.tensor(continuation)
    return logs[torch.arange(len(labels)), labels].sum().item(), bool((logs.argmax(-1) == labels).all())


@pytest.mark.parametrize(("family", "window"), [("llama3", None), ("mistral", 6)])
@pytest.mark.parametrize("slots", [400, 100_000])
def test_equals_torch(family, window, slots):
    hf = hf_model(family, **({"sliding_window": window} if window else {}))
    greedy = []
    for context, _ in PAIRS[4:6]:  # continuations that the model would choose itself
        with torch.no_grad():
            greedy.append((context, [hf(torch.tensor([context])).logits[0, -1].argmax().item()]))
    pairs = PAIRS + greedy
    results = {number: rest for number, *rest in score(to_model(hf, 3), pairs, slots=slots)}
    assert sorted(results) == list(range(len(pairs)))
    for number, pair in enumerate(pairs):
        log, best = expected(hf, *pair)
        np.testing.assert_allclose(results[number][0], log, rtol=1e-5, atol=1e-5)
        assert results[number][1] == best
    assert results[len(PAIRS)][1] and not results[3][1]


@pytest.mark.slow
def test_on_a_mesh():
    hf = hf_model("smollm2")
    model = to_model(hf)
    alone = sorted(score(model, PAIRS))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = decoder.with_params(model, place_params(mesh, decoder.to_params(model), model.config))
    for (number, log, best), other in zip(alone, sorted(score(spread, PAIRS)), strict=True):
        assert (number, best) == (other[0], other[2])
        np.testing.assert_allclose(other[1], log, rtol=1e-5)
