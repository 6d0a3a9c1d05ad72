"""Greedy decoding with a key-value cache, compiled as one loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.attention import visible

# Prompt lengths are rounded up to a multiple of this, so that few shapes are compiled.
BUCKET = 64
EMPTY = -1  # segment of a cache place that holds nothing yet


def greedy(model, prompts: list[list[int]], max_new_tokens: int, eos_token_ids) -> list[list[int]]:
    """The most probable continuation of each prompt, up to and without its end-of-sequence token.

    Args:
      model: a `llama.Llama`.
      prompts: token ids, of any lengths.
      max_new_tokens: at most so many are made.
      eos_token_ids: any of these ends an answer; none, and all have the full length.
    Returns: new token ids, one list a prompt.
    """
    length = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):  # on the right, so that all continue at the same place
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    eos = jnp.asarray(sorted(set(eos_token_ids)) or [EMPTY], jnp.int32)  # which is no token
    new = np.asarray(_decode(model, tokens, segments, eos, max_new_tokens))
    stops = np.isin(new, eos)
    return [row[: np.argmax(stop) if stop.any() else None].tolist() for row, stop in zip(new, stops)]


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def _decode(model, tokens_BT, segments_BT, eos_E, max_new_tokens):
    batch, length = tokens_BT.shape
    # Padding has position 0 and a segment of its own, 0; every new token continues segment 1.
    positions = jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0)
    last = positions[:, -1:]
    place = jnp.arange(length + max_new_tokens)
    kv_positions = jnp.where(place < length, jnp.pad(positions, ((0, 0), (0, max_new_tokens))), 0)
    kv_positions = jnp.where(place < length, kv_positions, last + 1 + place - length)
    kv_segments = jnp.pad(segments_BT, ((0, 0), (0, max_new_tokens)), constant_values=EMPTY)

    def advance(tokens, positions, segments, cache, start):
        written = (place >= length) & (place < start + tokens.shape[1])
        filled = jnp.where(written, 1, kv_segments)
        mask = visible(positions, kv_positions, segments, filled, model.config.sliding_window)
        states, cache = model.cached_states(tokens, positions, mask, cache, start)
        return model.logits(states[:, -1:]).argmax(axis=-1)[:, 0].astype(jnp.int32), cache

    def unfinished(carry):
        i, _, _, _, done = carry
        return (i < max_new_tokens) & ~done.all()

    def body(carry):
        i, token, new, cache, done = carry
        token = jnp.where(done, eos_E[0], token)
        new = new.at[:, i].set(token)
        done |= (token[:, None] == eos_E).any(axis=1)
        token, cache = advance(
            token[:, None], last + 1 + i, jnp.ones((batch, 1), jnp.int32), cache, length + i
        )
        return i + 1, token, new, cache, done

    cache = model.empty_cache(batch, length + max_new_tokens)
    token, cache = advance(tokens_BT, positions, segments_BT, cache, 0)
    new = jnp.full((batch, max_new_tokens), eos_E[0], jnp.int32)
    return jax.lax.while_loop(unfinished, body, (0, token, new, cache, jnp.zeros(batch, bool)))[2]
