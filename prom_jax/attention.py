"""Grouped-query attention with one rule for who sees whom, over several backends."""

import jax
import jax.numpy as jnp

# The backends of jax.nn.dot_product_attention. Its own default never picks cuDNN, so the choice is ours.
BACKENDS = ("xla", "cudnn")


# The segment of tokens that all segments of their row continue: a prompt's beginning that others share.
SHARED = -1


def visible(q_positions, kv_positions, q_segments, kv_segments, window=None):
    """Which keys each query may attend to, bool [B, 1, T, S].

    A query sees the keys of its own segment, and of segment SHARED, at its own position or before, and with a
    sliding `window` only the last `window` of them (itself included). This one rule serves packed rows,
    padding (segment 0, which no real token sees) and a key-value cache, where the places of tokens still to
    come have later positions.

    Args: positions and segments int32, [B, T] for queries and [B, S] for keys.
    """
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    own = q_segments[:, :, None] == kv_segments[:, None, :]
    mask = (distance >= 0) & (own | (kv_segments == SHARED)[:, None, :])
    if window is not None:
        mask &= distance < window
    return mask[:, None]


def attention(q_BTHD, k_BSKD, v_BSKD, mask_B1TS, backend="xla"):
    """softmax(q·k/√D)·v under a boolean mask; [B, T, H, D] in the dtype of `q`, softmax in float32.

    `K` key-value heads serve `H` query heads in consecutive groups. A query that sees nothing gets an
    average of everything rather than NaN: such places are padding and never bear loss.
    """
    return jax.nn.dot_product_attention(
        q_BTHD,
        k_BSKD.astype(q_BTHD.dtype),
        v_BSKD.astype(q_BTHD.dtype),
        mask=jnp.broadcast_to(mask_B1TS, (q_BTHD.shape[0], 1, q_BTHD.shape[1], k_BSKD.shape[1])),
        implementation=backend,
    )
