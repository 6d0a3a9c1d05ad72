"""The one switch for remedies that a platform needs: elsewhere the plain formula is computed."""

import jax


def on_cpu() -> bool:
    """Whether computations run on a CPU by default.

    XLA's code for CPUs is slow at four things, for each of which `ops` has a remedy: row sums (norm.py),
    sums over a vocabulary (cross_entropy.py), gradients of weights (linear.py) and attention scores that do
    not fit into a core's cache (attention_cpu.py).
    """
    return jax.default_backend() == "cpu"
