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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(hidden_RTD, head_VD, labels_RT, weights_RT, label_smoothing=0.0, chunk=None, softcap=None):
    """Sum of weighted token losses, the targets smoothed to (1-α)·onehot + α/V.

    Only tokens of non-zero weight reach the head. Their gradient is computed in the forward pass, chunk by
    chunk, so that no logits are kept or computed twice. Under a mesh each batch shard works through its own
    tokens. It gets the head whole, once, in the compute dtype, and keeps its own part alone of the sum of all
    shards' gradients of the head.

    Args:
      hidden_RTD: what the head reads, in the compute dtype.
      head_VD: the head's matrix, in the parameter dtype; its gradient is summed in float32.
      labels_RT: int32 token ids.
      weights_RT: float32; 0 where the token has no loss.
      label_smoothing: α.
      chunk: tokens at a time (`choose_chunk`); None for half of a shard's tokens, 256 to 1,024.
      softcap: logits x become softcap · tanh(x / softcap); None for no cap.
    Returns:
      Float32 scalar, the sum; divide by the sum of weights of the whole update.
    """
    value = functools.partial(_value, label_smoothing=label_smoothing, chunk=chunk, softcap=softcap)
    return _on_shards(value, hidden_RTD, head_VD, labels_RT, weights_RT)[0]


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


def _forward(hidden_RTD, head_VD, labels_RT, weights_RT, label_smoothing, chunk, softcap):
    settings = {"label_smoothing": label_smoothing, "chunk": chunk, "softcap": softcap}
    gradients = functools.partial(_gradients, **settings)
    loss, d_hidden, d_head = _on_shards(gradients, hidden_RTD, head_VD, labels_RT, weights_RT)
    return loss, (d_hidden, d_head.astype(head_VD.dtype))


def _backward(label_smoothing, chunk, softcap, gradients, cotangent):
    d_hidden, d_head = ((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_hidden, d_head, None, None


cross_entropy.defvjp(_forward, _backward)


def _on_shards(function, hidden_RTD, head_VD, labels_RT, weights_RT):
    """`function` of each batch shard's rows and the head; the loss and the head's gradient are summed over
    shards. (Gradients may be None.)"""
    head_VD = unshard_fsdp(head_VD, _HEAD_AXES, hidden_RTD.dtype)
    if num_batch_shards(jax.sharding.get_abstract_mesh()) > 1:
        rows = PartitionSpec(BATCH)
        function = jax.shard_map(
            function,
            in_specs=(rows, PartitionSpec(), rows, rows),
            out_specs=rows,
            axis_names=set(BATCH),
            check_vma=False,
        )
    losses, d_hidden, d_heads = function(hidden_RTD, head_VD, labels_RT, weights_RT)
    d_head = None if d_heads is None else reduce_scatter_grad(d_heads.sum(0), _HEAD_AXES)
    return losses.sum(), d_hidden, d_head


def _value(*arrays, **settings):
    """The loss of one shard's rows, as an array of one element, and nothing else."""
    chunks = _Chunks(*arrays, **settings)
    loss = jax.lax.fori_loop(0, chunks.num_active, lambda i, loss: loss + chunks.loss(i)[0], jnp.float32(0))
    return loss[None], None, None


def _gradients(hidden_RTD, *arrays, **settings):
    """The loss of one shard's rows and its gradients: of hidden states, and of the head in float32; each has
    an axis of shards, or, for hidden states, of rows."""
    chunks = _Chunks(hidden_RTD, *arrays, **settings)

    def of_chunk(i):
        loss, (at, hidden, d_logits) = chunks.loss(i, gradient=True)
        d_head = jnp.einsum("cv,cd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return loss, at, (d_logits @ chunks.head).astype(chunks.hidden.dtype), d_head

    def body(i, carry):
        loss, d_hidden, d_head = carry
        chunk_loss, at, rows, d_head_of_chunk = of_chunk(i)
        return loss + chunk_loss, d_hidden.at[at].set(rows, mode="drop"), d_head + d_head_of_chunk

    # The first chunk before the loop: there is always one, and no zeros as large as the head are written.
    loss, at, rows, d_head = of_chunk(0)
    d_hidden = jnp.zeros_like(chunks.hidden).at[at].set(rows, mode="drop")
    if chunks.num_chunks > 1:
        loss, d_hidden, d_head = jax.lax.fori_loop(1, chunks.num_active, body, (loss, d_hidden, d_head))
    return loss[None], d_hidden.reshape(hidden_RTD.shape), d_head[None]


class _Chunks:
    """The loss tokens of one shard, a chunk at a time."""

    def __init__(self, hidden_RTD, head_VD, labels_RT, weights_RT, *, label_smoothing, chunk, softcap):
        tokens = weights_RT.size
        self.chunk = min(chunk or min(max(-(-tokens // 2), 256), CHUNKS[-1]), tokens)
        self.hidden = hidden_RTD.reshape(tokens, -1)
        self.head, self.labels, self.weights = head_VD, labels_RT.ravel(), weights_RT.ravel()
        self.label_smoothing, self.softcap = label_smoothing, softcap
        # Loss tokens first; indices past the end point outside and are filled with zeros.
        order = jnp.argsort(self.weights == 0, stable=True)
        self.order = jnp.pad(order, (0, -tokens % self.chunk), constant_values=tokens)
        self.num_active = -(-jnp.count_nonzero(self.weights) // self.chunk)
        self.num_chunks = len(self.order) // self.chunk

    def loss(self, i, gradient=False):
        """Loss of chunk i; with `gradient` also its token indices, hidden states and d loss / d logits."""
        at = jax.lax.dynamic_slice_in_dim(self.order, i * self.chunk, self.chunk)
        hidden, labels, weights = (
            x.at[at].get(mode="fill", fill_value=0) for x in (self.hidden, self.labels, self.weights)
        )
        logits = jnp.einsum("cd,vd->cv", hidden, self.head, preferred_element_type=jnp.float32)
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
        return loss, (at, hidden, d_logits.astype(hidden.dtype))


def _logsumexp(logits_CV):
    """Over the vocabulary; on a CPU in two steps, as it shares the sums of few numbers among its cores, not
    those of many."""
    if not on_cpu():
        return jax.nn.logsumexp(logits_CV, axis=-1)
    parts = logits_CV.reshape(len(logits_CV), math.gcd(logits_CV.shape[-1], _PARTS), -1)
    return jax.nn.logsumexp(jax.nn.logsumexp(parts, axis=-1), axis=-1)
