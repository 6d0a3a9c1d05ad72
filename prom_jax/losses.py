"""Cross-entropy over a large vocabulary without ever holding [tokens, vocabulary] logits."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from prom_jax.sharding import BATCH, num_batch_shards

MAX_CHUNK = 1024  # tokens whose logits are in memory at a time, on each device


def cross_entropy(hidden_RTD, head_VD, labels_RT, weights_RT, label_smoothing=0.0, chunk=None):
    """Sum of weighted token losses, the targets smoothed to (1-α)·onehot + α/V.

    Only tokens of non-zero weight reach the head. Their gradient is computed in the forward pass, chunk by
    chunk, so that no logits are kept or computed twice. Under a mesh each batch shard works through its own
    tokens, and the head's gradient is summed over shards once.

    Args:
      hidden_RTD: what the head reads, in the compute dtype.
      head_VD: the head's matrix, in the parameter dtype; its gradient is summed in float32.
      labels_RT: int32 token ids.
      weights_RT: float32; 0 where the token bears no loss.
      label_smoothing: α.
      chunk: tokens at a time; None for a quarter of a shard's tokens, MAX_CHUNK at most, as all tokens of the
        last chunk are computed whether they bear loss or not.
    Returns: float32 scalar, the sum; divide by the sum of weights of the whole update.
    """
    loss = functools.partial(_shard_loss, label_smoothing=label_smoothing, chunk=chunk)
    if num_batch_shards(jax.sharding.get_abstract_mesh()) > 1:
        loss = jax.shard_map(
            loss,
            in_specs=(PartitionSpec(BATCH), PartitionSpec(), PartitionSpec(BATCH), PartitionSpec(BATCH)),
            out_specs=PartitionSpec(BATCH),
            axis_names=set(BATCH),
            check_vma=False,
        )
    return loss(hidden_RTD, head_VD, labels_RT, weights_RT).sum()


def _shard_loss(hidden_RTD, head_VD, labels_RT, weights_RT, label_smoothing, chunk):
    """The loss of one shard's rows, as an array of one element."""
    hidden_MD = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])
    loss = _chunked(hidden_MD, head_VD, labels_RT.ravel(), weights_RT.ravel(), label_smoothing, chunk)
    return loss[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden_MD, head_VD, labels_M, weights_M, label_smoothing, chunk):
    chunks = _Chunks(hidden_MD, head_VD, labels_M, weights_M, label_smoothing, chunk)
    return jax.lax.fori_loop(0, chunks.number, lambda i, loss: loss + chunks.loss(i)[0], jnp.float32(0))


def _chunked_forward(hidden_MD, head_VD, labels_M, weights_M, label_smoothing, chunk):
    chunks = _Chunks(hidden_MD, head_VD, labels_M, weights_M, label_smoothing, chunk)

    def body(i, carry):
        loss, d_hidden, d_head = carry
        chunk_loss, (at, hidden, d_logits) = chunks.loss(i, gradient=True)
        d_hidden = d_hidden.at[at].set((d_logits @ chunks.head).astype(d_hidden.dtype), mode="drop")
        d_head += jnp.einsum("cv,cd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return loss + chunk_loss, d_hidden, d_head

    start = jnp.float32(0), jnp.zeros_like(hidden_MD), jnp.zeros(head_VD.shape, jnp.float32)
    loss, d_hidden, d_head = jax.lax.fori_loop(0, chunks.number, body, start)
    return loss, (d_hidden, d_head.astype(head_VD.dtype))


def _chunked_backward(label_smoothing, chunk, gradients, cotangent):
    d_hidden, d_head = gradients
    return (
        (cotangent * d_hidden).astype(d_hidden.dtype),
        (cotangent * d_head).astype(d_head.dtype),
        None,
        None,
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)


class _Chunks:
    """The loss-bearing tokens of one shard, a chunk at a time."""

    def __init__(self, hidden_MD, head_VD, labels_M, weights_M, label_smoothing, chunk):
        tokens = weights_M.shape[0]
        self.chunk = min(chunk or min(MAX_CHUNK, -(-tokens // 4)), tokens)
        self.hidden, self.labels, self.weights = hidden_MD, labels_M, weights_M
        self.head = head_VD.astype(hidden_MD.dtype)
        self.label_smoothing = label_smoothing
        # Loss-bearing tokens first; places past the end point outside and are filled with zeros.
        order = jnp.argsort(weights_M == 0, stable=True)
        self.order = jnp.pad(order, (0, -tokens % self.chunk), constant_values=tokens)
        self.number = -(-jnp.count_nonzero(weights_M) // self.chunk)

    def loss(self, i, gradient=False):
        """Loss of chunk i; with `gradient` also its token indices, hidden states and d loss / d logits."""
        at = jax.lax.dynamic_slice_in_dim(self.order, i * self.chunk, self.chunk)
        take = lambda x: x.at[at].get(mode="fill", fill_value=0)
        hidden, labels, weights = take(self.hidden), take(self.labels), take(self.weights)
        logits = jnp.einsum("cd,vd->cv", hidden, self.head, preferred_element_type=jnp.float32)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        vocabulary = logits.shape[-1]
        smooth = self.label_smoothing
        expected = (1 - smooth) * jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        if smooth:
            expected += smooth * logits.mean(axis=-1)
        loss = jnp.sum(weights * (normalizer - expected))
        if not gradient:
            return loss, None
        targets = (1 - smooth) * (jnp.arange(vocabulary) == labels[:, None]) + smooth / vocabulary
        d_logits = weights[:, None] * (jnp.exp(logits - normalizer[:, None]) - targets)
        return loss, (at, hidden, d_logits.astype(hidden.dtype))
