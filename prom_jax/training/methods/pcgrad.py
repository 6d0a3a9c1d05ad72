"""PCGrad: both languages at the last layer, and where their gradients conflict, each loses what conflicts."""

import dataclasses

import jax
import jax.numpy as jnp

from prom_jax.training.methods.xllama2 import XLLaMA2


@dataclasses.dataclass(frozen=True)
class PCGrad(XLLaMA2):
    """xLLaMA2(t+e) with projected gradients (Yu et al., 2020, "Gradient surgery for multi-task learning").

    The tasks are the two languages. Where g_e · g_t < 0, each is projected onto the plane that is normal to
    the other as it was: g_e − (g_e · g_t / |g_t|²) g_t, and the same the other way round; the update takes
    the sum of both. Hoang et al. (2026, arXiv 2606.05613) do so in each bucket of parameters apart.

    What is chosen here (the abstract alone of the second paper could be read): a bucket is a block, or a
    parameter that is in none, such as the embeddings; both languages keep the weights that xLLaMA2's mean
    over all loss tokens gives them, so that nothing but the projection differs from it; gradients are those
    of the whole update, whatever its accumulation. With two tasks there is no order to draw.
    """

    name = "pcgrad"
    label = "PCGrad"
    colour = "tab:brown"
    compared = ()

    def combine(self, gradients):
        """The sum of both languages' gradients, each without what conflicts with the other."""

        def both(one, other):
            return jax.tree.map(jnp.add, project(one, other), project(other, one))

        english, target = gradients["english"], gradients["target"]
        return {name: both(english[name], target[name]) for name in english}


def project(gradient, other):
    """A gradient without its part against the other one, block by block.

    Args:
      gradient, other: a parameter's, or {parameter: [layers, …]} of a stack of blocks.

    Returns:
      As `gradient`.
    """
    in_stack = isinstance(gradient, dict)
    along, length = _dot(gradient, other, in_stack), _dot(other, other, in_stack)
    share = jnp.minimum(along, 0) / jnp.where(length > 0, length, 1)

    def subtract(x, y):
        of_x = share.reshape(-1, *[1] * (x.ndim - 1)) if in_stack else share
        return (x - of_x * y).astype(x.dtype)

    return jax.tree.map(subtract, gradient, other)


def _dot(one, other, in_stack: bool):
    """Inner products in float32: of a parameter, a scalar; of a stack of blocks, [layers]."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    wide = ((x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in leaves)
    return sum(jnp.sum(x * y, axis=tuple(range(in_stack, x.ndim))) for x, y in wide)


METHOD = PCGrad
