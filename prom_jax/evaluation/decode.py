"""Greedy decoding with a key-value cache, compiled as one loop."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.evaluation.batching import Batch, own_segment, placed, plan
from prom_jax.ops.attention import visible
from prom_jax.parallel.sharding import BATCH, constrain, num_batch_shards

PLACES = 32_768  # tokens whose keys and values are in memory at a time
CHUNK = 32  # new tokens between two looks from outside
ROOM = 128  # new tokens for which the cache grows at a time: most answers need no more
QUERIES = 256  # tokens of each row whose attention scores are in memory at a time


def greedy(model, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids) -> list[list[int]]:
    """The most probable continuation of each prompt, up to and without its end-of-sequence token.

    Args:
      model: a `llama.Llama`.
      prompts: token ids, of any lengths but 0.
      max_new_tokens: at most so many are made.
      eos_token_ids: any of these ends an answer; none, and all have the full length.
    Returns: new token ids, one list a prompt.
    """
    answers = dict(decode(model, prompts, max_new_tokens, eos_token_ids))
    stop = lambda answer: answer[:-1] if answer and answer[-1] in eos_token_ids else answer
    return [stop(answers[number]) for number in range(len(prompts))]


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens,
    *,
    watch: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
    places: int = PLACES,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers as they become ready, the longest prompts' first.

    Prompts that begin alike are computed once where they do, and their keys and values are kept once.

    Args:
      model, prompts, max_new_tokens: as in `greedy`; rows are spread over the mesh that the model lies on.
      stop_tokens: an answer ends with the first of these, which is still part of it.
      watch: called every `chunk` tokens with an unfinished answer's number and what there is of it; true ends
        it.
      places: how many tokens' keys and values are in memory at a time, over all devices.
    Yields: a prompt's number and its answer.
    """
    stops = np.zeros(model.config.vocab_size, bool)
    stops[list(stop_tokens)] = True
    watch = watch or (lambda number, answer: False)
    shards = num_batch_shards(model.mesh)
    for batch in plan(prompts, [1] * len(prompts), extra=max_new_tokens, places=places, shards=shards):
        made, lengths = _answer(model, batch, max_new_tokens, stops, watch, chunk)
        for b, r in np.argwhere(batch.texts >= 0):
            yield int(batch.texts[b, r]), made[b, r, : lengths[b, r]].tolist()


def _answer(model, batch: Batch, max_new_tokens: int, stops, watch, chunk: int):
    """Tokens made for the texts of a batch, [B, R, max_new_tokens], and how many of them count, [B, R]."""
    with jax.set_mesh(model.mesh):
        room = min(ROOM, max_new_tokens)
        state = _begin(model, placed(model, batch, done=batch.texts < 0), stops, max_new_tokens, room)
        while True:
            step = int(state["step"])
            made, lengths, done = (np.array(state[name]) for name in ("made", "lengths", "done"))
            for b, r in np.argwhere(~done):
                done[b, r] = watch(int(batch.texts[b, r]), made[b, r, :step].tolist())
            if step == max_new_tokens or done.all():
                return made, lengths
            state["done"] = jax.device_put(done, state["done"].sharding)
            if step == room:
                more = min(ROOM, max_new_tokens - room)
                state = _longer(state, room, more)
                room += more
            state = _advance(model, state, stops, min(step + chunk, room))


def prefill(model, rows, more=0):
    """The final states [B, T, D] of a batch's rows, and the cache with their keys and values, and with `more`
    places behind them.

    Each batch shard goes through its rows one after the other, and through a row in parts of up to QUERIES
    tokens from where its padding ends: no time is spent on padding, and attention scores are never whole.
    """
    batch, length = rows["tokens"].shape
    shards = num_batch_shards(jax.sharding.get_abstract_mesh())
    number = next(n for n in itertools.count(-(-length // QUERIES)) if length % n == 0)
    size = length // number
    by_shard = lambda x, axis=0: x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])
    of_rows = [by_shard(rows[name]) for name in ("tokens", "positions", "segments")]
    padding = (jnp.cumsum(rows["segments"] != 0, axis=1) == 0).sum(axis=1)
    first_parts = by_shard(padding).min(axis=0) // size

    def row(r, done):
        tokens, positions, segments = (x[:, r] for x in of_rows)

        def part(p, carry):
            states, cache = carry
            own = lambda x: jax.lax.dynamic_slice_in_dim(x, p * size, size, axis=1)
            mask = visible(own(positions), positions, own(segments), segments, model.config.sliding_window)
            new, cache = model.cached_states(own(tokens), own(positions), mask, cache, p * size)
            return jax.lax.dynamic_update_slice_in_dim(states, new, p * size, axis=1), cache

        empty = jnp.zeros((shards, length, model.config.hidden_size), model.compute.dtype)
        states, cache = jax.lax.fori_loop(
            first_parts[r], number, part, (empty, model.empty_cache(shards, length))
        )
        into = lambda whole, new: whole.at[:, :, r, :, :length].set(new)
        return done[0].at[:, r].set(states), jax.tree.map(into, done[1], cache)

    states = jnp.zeros((batch, length, model.config.hidden_size), model.compute.dtype)
    cache = model.empty_cache(batch, length + more)
    done = by_shard(states), jax.tree.map(functools.partial(by_shard, axis=1), cache)
    done = jax.lax.fori_loop(0, batch // shards, row, done)
    return jax.tree.map(lambda new, old: new.reshape(old.shape), done, (states, cache))


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "room"))
def _begin(model, rows, stops_V, max_new_tokens, room):
    """Runs the prompts: the state of `_advance`, with the first new token of each answer, and with `room` for
    so many."""
    batch, number = rows["ends"].shape
    states, cache = prefill(model, rows, more=room * number)
    last = jnp.take_along_axis(states, rows["ends"][..., None], axis=1)
    state = {
        "cache": cache,
        "kv_positions": rows["positions"],
        "kv_segments": rows["segments"],
        "before": jnp.int32(rows["tokens"].shape[1]),
        "first": rows["lengths"],  # the position of the first new token
        "made": jnp.zeros((batch, number, max_new_tokens), jnp.int32),
        "lengths": jnp.zeros((batch, number), jnp.int32),
        "done": rows["done"],
        "step": jnp.int32(0),
    }
    state |= _new_places(state, 0, room)
    return _laid_out(_keep(state, model.logits(last).argmax(axis=-1), stops_V))


def _new_places(state, room, more):
    """Who sees the places of `more` new tokens of every text, behind those of the first `room`: the i-th of
    the r-th has place T + i·R + r."""
    number = state["first"].shape[1]
    steps = jnp.repeat(room + jnp.arange(more), number)
    positions = steps + jnp.tile(state["first"], more)
    segments = jnp.broadcast_to(jnp.tile(own_segment(jnp.arange(number)), more), positions.shape)
    behind = lambda old, new: jnp.concatenate([old, new], axis=1)
    return {
        "kv_positions": behind(state["kv_positions"], positions),
        "kv_segments": behind(state["kv_segments"], segments),
    }


@functools.partial(jax.jit, static_argnames=("room", "more"))
def _longer(state, room, more):
    """The state with room for `more` new tokens, where it has some for `room`."""
    added = more * state["first"].shape[1]
    longer = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, added), (0, 0)])
    cache = jax.tree.map(longer, state["cache"])
    return _laid_out(state | _new_places(state, room, more) | {"cache": cache})


@functools.partial(jax.jit, donate_argnames="state")
def _advance(model, state, stops_V, until):
    """New tokens up to the `until`-th, or until all answers have ended."""
    batch, number, _ = state["made"].shape
    segments = jnp.broadcast_to(own_segment(jnp.arange(number)), (batch, number))

    def body(state):
        last = state["step"] - 1
        tokens, positions = state["made"][:, :, last], state["first"] + last
        kv = state["kv_positions"], segments, state["kv_segments"]
        mask = visible(positions, *kv, model.config.sliding_window)
        place = state["before"] + last * number
        states, cache = model.cached_states(tokens, positions, mask, state["cache"], place)
        return _keep(state | {"cache": cache}, model.logits(states).argmax(axis=-1), stops_V)

    unfinished = lambda state: (state["step"] < until) & ~state["done"].all()
    return _laid_out(jax.lax.while_loop(unfinished, body, state))


def _keep(state, tokens_BR, stops_V):
    """The state with one more token in each answer that has not ended."""
    tokens = tokens_BR.astype(jnp.int32)
    return state | {
        "made": state["made"].at[:, :, state["step"]].set(tokens),
        "lengths": state["lengths"] + ~state["done"],
        "done": state["done"] | stops_V[tokens],
        "step": state["step"] + 1,
    }


def _laid_out(state):
    """The state as it lies on the mesh: what is looked at from outside whole on every device, the rest by
    rows, and the cache by heads besides. One layout, or `_advance` would be compiled for each."""
    shown = {name: constrain(state[name]) for name in ("made", "lengths", "done", "step", "before")}
    by_row = {name: constrain(state[name], BATCH) for name in ("kv_positions", "kv_segments", "first")}
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    by_head = lambda x: constrain(x, None, BATCH, "tensor" if x.shape[2] % tensor == 0 else None)
    return shown | by_row | {"cache": jax.tree.map(by_head, state["cache"])}
