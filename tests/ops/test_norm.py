"""The root-mean-square norm against torch's, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prom_jax.ops.norm import rms_norm
from tests.reference import relative_error


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])  # where ε weighs and where it does not
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_norm_and_its_gradient_are_torchs(unit_offset, size, dtype, tolerance):
    random = np.random.default_rng(0)
    x, d_out = size * random.normal(size=(2, 3, 5, 64)).astype(np.float32)
    scale = random.normal(size=64).astype(np.float32)
    x_torch, scale_torch = (torch.tensor(array, requires_grad=True) for array in (x, scale))
    expected = torch.nn.functional.rms_norm(x_torch, (64,), scale_torch + unit_offset, eps=1e-5)
    expected.backward(torch.tensor(d_out))

    inputs = [jnp.asarray(array, dtype) for array in (x, scale)]
    out, backward = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-5, unit_offset), *inputs)
    d_x, d_scale = backward(jnp.asarray(d_out, dtype))
    for ours, theirs in ((out, expected.detach()), (d_x, x_torch.grad), (d_scale, scale_torch.grad)):
        assert ours.dtype == dtype
        assert relative_error(np.asarray(ours, np.float32), theirs.numpy()) < tolerance


def test_one_is_added_in_float32():
    """In bfloat16 a weight of 2⁻¹⁰ would be lost next to 1."""
    x = jnp.full((1, 64), 1.0, jnp.float32)
    weight = jnp.full(64, 2.0**-10, jnp.bfloat16)
    np.testing.assert_allclose(rms_norm(x, weight, 0.0, unit_offset=True), 1 + 2.0**-10, rtol=1e-6)
