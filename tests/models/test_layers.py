"""Parts of a block that no family of the package has."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3 import modeling_phi3

from prom_jax.models.config import Rope
from prom_jax.models.layers import rope_frequencies, rotate
from prom_jax.models.settings import Settings, rope_keys
from tests.reference import SIZES, relative_error


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5])
def test_a_share_of_a_head_is_rotated_as_in_phi(share):
    config = Phi3Config(**SIZES, partial_rotary_factor=share)
    settings = Settings({**config.to_dict(), **{key: SIZES[key] for key in SIZES}}, {})
    rope = settings.take_rope(partial=True)
    assert rope == Rope(share=share)
    assert Settings({**SIZES, **rope_keys(rope)}, {}).take_rope(partial=True) == rope

    head_dim = 16
    config = Phi3Config(**{**SIZES, "hidden_size": 8 * head_dim}, partial_rotary_factor=share)
    positions = np.arange(600)[None]
    x = np.random.default_rng(0).normal(size=(1, 600, 8, head_dim)).astype(np.float32)
    cos, sin = modeling_phi3.Phi3RotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    heads_first = torch.from_numpy(x).transpose(1, 2)
    expected, _ = modeling_phi3.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    frequencies = rope_frequencies(rope, head_dim, share)
    ours = rotate(jnp.asarray(x), positions[..., None].astype(np.float32) * frequencies)
    assert frequencies.shape == (share * head_dim / 2,)
    assert relative_error(ours, expected.transpose(1, 2).numpy()) < 5e-5
