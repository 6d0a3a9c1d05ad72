"""Products of one input with several matrices, one by one and joined, and with those of low rank."""

import jax
import numpy as np

from prom_jax.ops.linear import joined_linear, linear, low_rank
from tests.reference import relative_error


def test_joined_products_are_those_of_each_matrix():
    random = np.random.default_rng(0)
    x, *matrices = (random.normal(size=shape) for shape in ((2, 5, 8), (6, 8), (3, 8), (4, 8)))

    def loss(x, matrices, joined):
        products = joined_linear(x, matrices) if joined else linear(x, matrices, training=False)
        return sum((product**2).sum() for product in products), products

    for joined in (False, True):
        gradients, products = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, matrices, joined)
        expected = [x @ matrix.T for matrix in matrices]
        for ours, theirs in zip(products, expected, strict=True):
            assert relative_error(ours, theirs) <= 1e-6
        d_x = 2 * sum(product @ matrix for product, matrix in zip(expected, matrices))
        assert relative_error(gradients[0], d_x) <= 1e-6
        for ours, product in zip(gradients[1], expected, strict=True):
            assert relative_error(ours, 2 * np.einsum("bto,bti->oi", product, x)) <= 1e-6


def test_products_of_low_rank_are_those_of_the_whole_matrices():
    random = np.random.default_rng(0)
    x, *parts = (random.normal(size=shape) for shape in ((2, 5, 8), (2, 8), (3, 8), (6, 2), (4, 3)))

    def loss(x, *parts):
        products = low_rank(x, parts[:2], parts[2:])
        return sum((product**2).sum() for product in products), products

    def whole(x, *parts):
        products = [x @ (up @ down).T for down, up in zip(parts[:2], parts[2:])]
        return sum((product**2).sum() for product in products), products

    ours, theirs = (
        jax.tree.leaves(jax.grad(each, argnums=range(5), has_aux=True)(x, *parts)) for each in (loss, whole)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) <= 1e-5
