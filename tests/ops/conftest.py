"""Kernels of machines that are not here: run step by step, or lowered."""

import functools

import jax
import pytest
import tokamax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for TPU are run step by step, without one."""
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)


class Hopper:
    """What tokamax asks of a GPU before it lowers for one."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 132


@pytest.fixture
def hopper(monkeypatch):
    """Programs can be lowered for such a GPU (lowering_platforms=('cuda',)), without one."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", Hopper)
    gpu = jax.sharding.AbstractDevice(Hopper.device_kind, Hopper.core_count, Hopper.platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with tokamax.config.cross_compile(True), jax.sharding.use_abstract_mesh(mesh):
        yield
