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
def test_the_norm_and_its_gradient_are_torchs(size, dtype, tolerance):
    random = np.random.default_rng(0)
    x, d_out = size * random.normal(size=(2, 3, 5, 64)).astype(np.float32)
    scale = random.normal(size=64).astype(np.float32)
    x_torch, scale_torch = (torch.tensor(array, requires_grad=True) for array in (x, scale))
    expected = torch.nn.functional.rms_norm(x_torch, (64,), scale_torch, eps=1e-5)
    expected.backward(torch.tensor(d_out))

    inputs = [jnp.asarray(array, dtype) for array in (x, scale)]
    out, backward = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-5), *inputs)
    d_x, d_scale = backward(jnp.asarray(d_out, dtype))
    for ours, theirs in ((out, expected.detach()), (d_x, x_torch.grad), (d_scale, scale_torch.grad)):
        assert ours.dtype == dtype
        assert relative_error(np.asarray(ours, np.float32), theirs.numpy()) < tolerance


