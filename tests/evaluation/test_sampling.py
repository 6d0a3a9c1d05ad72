"""Sampling against transformers' processors of logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prom_jax.evaluation.decode import decode, greedy
from prom_jax.evaluation.sampling import Sampling
from prom_jax.utils.errors import UserError
from tests.reference import hf_model, to_model

LOGITS = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 2.0, "top_p": 0.01},
    ],
)
def test_limits_equal_transformers(settings):
    expected = torch.from_numpy(LOGITS.copy())
    for name, value in settings.items():
        expected = WARPERS[name](value)(None, expected)
    ours = np.asarray(Sampling(**settings).limit(jnp.asarray(LOGITS)))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    assert np.isinf(ours).any() == any(name != "temperature" for name in settings)


def test_draws_follow_the_distribution():
    sampling = Sampling(temperature=1.5, top_k=5)
    logits, numbers = jnp.broadcast_to(LOGITS[0], (20_000, 50)), jnp.arange(20_000)
    draw = lambda step: np.asarray(sampling.choose(logits, 0, numbers, step))
    expected = np.exp(np.asarray(sampling.limit(jnp.asarray(LOGITS[0]))))
    shares = np.bincount(draw(3), minlength=50) / 20_000
    assert np.abs(shares - expected / expected.sum()).max() < 0.012  # four standard deviations
    assert (draw(3) != draw(4)).any()


def test_decoding_draws_by_seed_and_is_greedy_at_the_limit():
    model, prompt = to_model(hf_model("smollm2")), [5, 6, 7]
    answer = lambda seed, **given: next(
        decode(model, [prompt], 12, [], sampling=Sampling(**given), seed=seed)
    )[1]
    assert answer(1, top_k=1) == answer(2, top_k=1) == greedy(model, [prompt], 12, [])[0]
    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(4)}) == 4
    with pytest.raises(UserError, match="temperature=0"):
        Sampling(temperature=0)


def test_an_answer_is_the_same_whatever_it_is_computed_with():
    model = to_model(hf_model("smollm2"))
    chance = np.random.default_rng(1)
    prompts = [chance.integers(3, 90, length).tolist() for length in (3, 40, 7, 90, 5, 41)]
    prompts.append(prompts[1])  # asked twice
    sampling = Sampling(temperature=0.9, top_k=30)
    together = dict(decode(model, prompts, 9, [], sampling=sampling, seed=5))
    assert together[1] != together[6]
    few = dict(decode(model, prompts[2:5], 9, [], sampling=sampling, seed=5, numbers=[2, 3, 4], slots=120))
    assert [few[0], few[1], few[2]] == [together[2], together[3], together[4]]
