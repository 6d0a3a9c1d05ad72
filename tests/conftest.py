"""Eight virtual CPU devices and exact float32 products for the whole suite."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax

jax.config.update("jax_default_matmul_precision", "highest")
