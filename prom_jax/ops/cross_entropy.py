"""Cross-entropy over a large vocabulary without ever holding [tokens, vocabulary] logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prom_jax.ops.platform import on_cpu
from prom_jax.parallel.sharding import BATCH, num_batch_shards, reduce_scatter_grad, unshard_fsdp

# Tokens whose logits are in memory at a time, on each device. For each chunk the head's gradient is read and
# written once, which takes as long as the products of CHUNK_COST tokens.
CHUNKS = tuple(range(64, 1025, 32))
CHUNK_COST = 100
_PARTS = 64  # of the vocabulary, for a sum over it on a CPU, where its size is a multiple
_HEAD_AXES = ("tensor", "fsdp")  # of a head [V, D]


def cross_entropy(hidden_RTD, head_VD, labels_RT, weights_RT, label_smoothing=0.0, chunk=None, softcap=None):
    """Sum of weighted token losses, the targets smoothed to (1-α)·onehot + α/V.

    Only tokens of non-zero weight reach the head. Their gradient is computed in the forward pass, chunk by
    chunk, so that no logits are kept or computed twice. Under a mesh each batch shard works through its own
    tokens. It gets the head whole, once, in the compute dtype, and keeps its own part alone of the sum of all
    shards' gradients of the head. A head that is not differentiated has no gradient made.

    Args:
      hidden_RTD: what the head reads, in the compute dtype; or a tuple of arrays [R, T, …].
      head_VD: the head's matrix, in the parameter dtype; its gradient is summed in float32. Or a tuple of as
        many, and the logits are the sum of their products.
      labels_RT: int32 token ids.
      weights_RT: float32; 0 where the token has no loss.
      label_smoothing: α.
      chunk: tokens at a time (`choose_chunk`); None for half of a shard's tokens, 256 to 1,024.
      softcap: logits x become softcap · tanh(x / softcap); None for no cap.

    Returns:
      Float32 scalar, the sum; divide by the sum of weights of the whole update.
    """
    hiddens, heads = (x if isinstance(x, tuple) else (x,) for x in (hidden_RTD, head_VD))
    return _loss(hiddens, heads, labels_RT, weights_RT, label_smoothing, chunk, softcap)


def choose_chunk(loss_tokens, slots: int) -> int:
    """The chunk with which updates cost least: all tokens of the last chunk are computed, whether they have
    loss or not, and each chunk has a cost of its own.

    Args:
      loss_tokens: int [updates], the loss tokens of each on one shard.
      slots: of a shard's rows, which is the most that a chunk can have.

    Returns:
      A number of tokens, one of CHUNKS or `slots`.
    """
    options = [size for size in CHUNKS if size < slots] or [slots]
    chunks = np.maximum(1, -(-np.asarray(loss_tokens)[:, None] // np.array(options)))
    costs = (chunks * (np.array(options) + CHUNK_COST)).sum(axis=0)
    return options[int(costs.argmin())]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(hiddens, heads, labels_RT, weights_RT, label_smoothing, chunk, softcap):
    value = functools.partial(_value, label_smoothing=label_smoothing, chunk=chunk, softcap=softcap)
    return _on_shards(value, hiddens, heads, labels_RT, weights_RT)[0]


def _forward(hiddens, heads, labels_RT, weights_RT, label_smoothing, chunk, softcap):
    settings = {"label_smoothing": label_smoothing, "chunk": chunk, "softcap": softcap}
    gradients = functools.partial(_gradients, learns=tuple(head.perturbed for head in heads), **settings)
    hiddens, heads = (tuple(x.value for x in xs) for xs in (hiddens, heads))
    loss, d_hiddens, d_heads = _on_shards(gradients, hiddens, heads, labels_RT.value, weights_RT.value)
    d_heads = (None if d_head is None else d_head.astype(head.dtype) for d_head, head in zip(d_heads, heads))
    return loss, (d_hiddens, tuple(d_heads))


def _backward(label_smoothing, chunk, softcap, gradients, cotangent):
    d_hiddens, d_heads = jax.tree.map(
        lambda gradient: (cotangent * gradient).astype(gradient.dtype), gradients
    )
    return d_hiddens, d_heads, None, None


# With symbolic zeros `_forward` is told which arguments are differentiated.
_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_shards(function, hiddens, heads, labels_RT, weights_RT):
    """`function` of each batch shard's rows and the heads; the loss and the heads' gradients are summed over
    shards. (Gradients may be None.)"""
    heads = tuple(unshard_fsdp(head, _HEAD_AXES, hidden.dtype) for hidden, head in zip(hiddens, heads))
    if num_batch_shards(jax.sharding.get_abstract_mesh()) > 1:
        rows = PartitionSpec(BATCH)
        function = jax.shard_map(
            function,
            in_specs=(rows, PartitionSpec(), rows, rows),
            out_specs=rows,
            axis_names=set(BATCH),
            check_vma=False,
        )
    losses, d_hiddens, d_heads = function(hiddens, heads, labels_RT, weights_RT)
    d_heads = jax.tree.map(lambda d_head: reduce_scatter_grad(d_head.sum(0), _HEAD_AXES), d_heads)
    return losses.sum(), d_hiddens, d_heads


def _value(*arrays, **settings):
    """The loss of one shard's rows, as an array of one element, and nothing else."""
    chunks = _Chunks(*arrays, **settings)
    loss = jax.lax.fori_loop(0, chunks.num_active, lambda i, loss: loss + chunks.loss(i)[0], jnp.float32(0))
    return loss[None], None, None


def _gradients(hiddens, *arrays, learns, **settings):
    """The loss of one shard's rows and its gradients: of hidden states, and in float32 of the heads that
    learn, None of others; each has an axis of shards, or, for hidden states, of rows."""
    chunks = _Chunks(hiddens, *arrays, **settings)

    def of_chunk(i):
        loss, (at, hiddens, d_logits) = chunks.loss(i, gradient=True)
        d_heads = tuple(
            jnp.einsum("cv,cd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
            if learns_it
            else None
            for hidden, learns_it in zip(hiddens, learns)
        )
        rows = tuple(
            (d_logits @ head).astype(hidden.dtype) for hidden, head in zip(chunks.hiddens, chunks.heads)
        )
        return loss, at, rows, d_heads

    def scatter(d_hiddens, at, rows):
        return jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), d_hiddens, rows)

    def body(i, carry):
        loss, d_hiddens, d_heads = carry
        chunk_loss, at, rows, d_heads_of_chunk = of_chunk(i)
        d_heads = jax.tree.map(jnp.add, d_heads, d_heads_of_chunk)
        return loss + chunk_loss, scatter(d_hiddens, at, rows), d_heads

    # The first chunk before the loop: there is always one, and no zeros as large as the head are written.
    loss, at, rows, d_heads = of_chunk(0)
    d_hiddens = scatter(jax.tree.map(jnp.zeros_like, chunks.hiddens), at, rows)
    if chunks.num_chunks > 1:
        loss, d_hiddens, d_heads = jax.lax.fori_loop(1, chunks.num_active, body, (loss, d_hiddens, d_heads))
    d_hiddens = jax.tree.map(lambda d_hidden, hidden: d_hidden.reshape(hidden.shape), d_hiddens, hiddens)
    return loss[None], d_hiddens, jax.tree.map(lambda d_head: d_head[None], d_heads)


class _Chunks:
    """The loss tokens of one shard, a chunk at a time."""

    def __init__(self, hiddens, heads, labels_RT, weights_RT, *, label_smoothing, chunk, softcap):
        tokens = weights_RT.size
        self.chunk = min(chunk or min(max(-(-tokens // 2), 256), CHUNKS[-1]), tokens)
        self.hiddens = tuple(hidden.reshape(tokens, -1) for hidden in hiddens)
        self.heads, self.labels, self.weights = heads, labels_RT.ravel(), weights_RT.ravel()
        self.label_smoothing, self.softcap = label_smoothing, softcap
        # Loss tokens first; indices past the end point outside and are filled with zeros.
        order = jnp.argsort(self.weights == 0, stable=True)
        self.order = jnp.pad(order, (0, -tokens % self.chunk), constant_values=tokens)
        self.num_active = -(-jnp.count_nonzero(self.weights) // self.chunk)
        self.num_chunks = len(self.order) // self.chunk

    def loss(self, i, gradient=False):
        """Loss of chunk i; with `gradient` also its token indices, hidden states and d loss / d logits."""
        at = jax.lax.dynamic_slice_in_dim(self.order, i * self.chunk, self.chunk)
        hiddens, labels, weights = jax.tree.map(
            lambda x: x.at[at].get(mode="fill", fill_value=0), (self.hiddens, self.labels, self.weights)
        )
        logits, *more = (
            jnp.einsum("cd,vd->cv", hidden, head, preferred_element_type=jnp.float32)
            for hidden, head in zip(hiddens, self.heads)
        )
        logits = functools.reduce(jnp.add, more, logits)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        vocabulary, normalizer = logits.shape[-1], _logsumexp(logits)
        smooth = self.label_smoothing
        expected = (1 - smooth) * jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        if smooth:
            expected += smooth * logits.mean(axis=-1)
        loss = jnp.sum(weights * (normalizer - expected))
        if not gradient:
            return loss, None
        targets = (1 - smooth) * (jnp.arange(vocabulary) == labels[:, None]) + smooth / vocabulary
        d_logits = weights[:, None] * (jnp.exp(logits - normalizer[:, None]) - targets)
        if self.softcap is not None:
            d_logits *= 1 - (logits / self.softcap) ** 2
        return loss, (at, hiddens, d_logits.astype(hiddens[0].dtype))


def _logsumexp(logits_CV):
    """Over the vocabulary; on a CPU in two steps, as it shares the sums of few numbers among its cores, not
    those of many."""
    if not on_cpu():
        return jax.nn.logsumexp(logits_CV, axis=-1)
    parts = logits_CV.reshape(len(logits_CV), math.gcd(logits_CV.shape[-1], _PARTS), -1)
    return jax.nn.logsumexp(jax.nn.logsumexp(parts, axis=-1), axis=-1)
