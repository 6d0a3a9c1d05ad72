"""Decoding with a key-value cache, compiled as one loop: greedy, or with draws."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.evaluation.batching import Batch, own_segment, placed, plan
from prom_jax.evaluation.sampling import Sampling
from prom_jax.models.inputs import Rows
from prom_jax.parallel.sharding import BATCH, constrain, num_batch_shards

SLOTS = 32_768  # tokens whose keys and values are in memory at a time
CHUNK = 32  # new tokens between two calls of `watch`
GROWTH = 128  # new tokens for which the cache grows at a time: most answers need no more
QUERIES = 256  # tokens of each row whose attention scores are in memory at a time


def greedy(model, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids) -> list[list[int]]:
    """The most probable continuation of each prompt, up to and without its end-of-sequence token.

    Args:
      model: a `models.decoder.Decoder`.
      prompts: token ids, of any lengths but 0.
      max_new_tokens: the most tokens of an answer.
      eos_token_ids: any of these ends an answer; none, and all have the full length.

    Returns:
      New token ids, one list a prompt.
    """
    answers = dict(decode(model, prompts, max_new_tokens, eos_token_ids))

    def without_eos(answer):
        return answer[:-1] if answer and answer[-1] in eos_token_ids else answer

    return [without_eos(answers[number]) for number in range(len(prompts))]


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    watch: Callable[[int, list[int]], bool] | None = None,
    chunk: int = CHUNK,
    slots: int = SLOTS,
) -> Iterator[tuple[int, list[int]]]:
    """Answers as they become ready, the longest prompts' first.

    Prefixes that prompts share are computed once, and their keys and values are kept once.

    Args:
      model, prompts, max_new_tokens: as in `greedy`; rows are spread over the model's mesh.
      stop_tokens: an answer ends with the first of these, which is still part of it.
      sampling: how tokens are drawn; None takes the most probable ones.
      seed, numbers: of the draws, one number a prompt, its index if None: an answer depends on these two and
        its prompt, not on the prompts that it is computed with.
      watch: called every `chunk` tokens with an unfinished answer's number and what there is of it; true ends
        it.
      slots: how many tokens' keys and values are in memory at a time, over all devices.

    Yields:
      A prompt's number and its answer.
    """
    stops = np.zeros(model.config.vocab_size, bool)
    stops[list(stop_tokens)] = True
    watch = watch or _never
    shards = num_batch_shards(model.mesh)
    numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
    for batch in plan(prompts, [1] * len(prompts), extra=max_new_tokens, slots=slots, shards=shards):
        draws = sampling, np.uint32(seed % 2**32), numbers[batch.texts].astype(np.uint32)
        made, lengths = _answer(model, batch, max_new_tokens, stops, draws, watch, chunk)
        for b, r in np.argwhere(batch.texts >= 0):
            yield int(batch.texts[b, r]), made[b, r, : lengths[b, r]].tolist()


def _never(number: int, answer: list[int]) -> bool:
    return False


def _answer(model, batch: Batch, max_new_tokens: int, stops, draws, watch, chunk: int):
    """Tokens made for the texts of a batch, [B, R, max_new_tokens], and how many of them count, [B, R]; draws
    are the sampling, its seed and the numbers of the texts."""
    sampling, seed, numbers = draws
    with jax.set_mesh(model.mesh):
        capacity = min(GROWTH, max_new_tokens)
        rows = placed(model, batch, done=batch.texts < 0, numbers=numbers)
        state = _prefill(model, rows, stops, sampling, seed, max_new_tokens, capacity)
        while True:
            step = int(state["step"])
            made, lengths, done = (np.array(state[name]) for name in ("made", "lengths", "done"))
            for b, r in np.argwhere(~done):
                done[b, r] = watch(int(batch.texts[b, r]), made[b, r, :step].tolist())
            if step == max_new_tokens or done.all():
                return made, lengths
            state["done"] = jax.device_put(done, state["done"].sharding)
            if step == capacity:
                more = min(GROWTH, max_new_tokens - capacity)
                state = _grow_cache(state, more)
                capacity += more
            state = _decode_steps(model, state, stops, sampling, min(step + chunk, capacity))


def prefill(model, rows, capacity=0):
    """The residual stream after the last block [B, T, D] of a batch's rows, and the cache with their keys and
    values and `capacity` empty slots after them.

    Each batch shard goes through its rows one after the other, and through a row in parts of up to QUERIES
    tokens from where its padding ends: no time is spent on padding, and attention scores are never whole.
    """
    batch, length = rows["tokens"].shape
    shards = num_batch_shards(jax.sharding.get_abstract_mesh())
    number = next(n for n in itertools.count(-(-length // QUERIES)) if length % n == 0)
    size = length // number

    def by_shard(x, axis=0):
        return x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])

    of_rows = [by_shard(rows[name]) for name in ("tokens", "positions", "segments")]
    padding = (jnp.cumsum(rows["segments"] != 0, axis=1) == 0).sum(axis=1)
    first_parts = by_shard(padding).min(axis=0) // size

    def one_row(r, done):
        def one_part(p, carry):
            states, cache = carry
            part = (jax.lax.dynamic_slice_in_dim(x[:, r], p * size, size, axis=1) for x in of_rows)
            (((new,),), _, cache) = model.forward(Rows(*part), cache=cache, slot=p * size)
            return jax.lax.dynamic_update_slice_in_dim(states, new, p * size, axis=1), cache

        empty = jnp.zeros((shards, length, model.config.hidden_size), model.compute.dtype)
        states, cache = jax.lax.fori_loop(
            first_parts[r], number, one_part, (empty, model.empty_cache(shards, length))
        )

        def put(whole, new):
            return whole.at[:, :, r, :, :length].set(new)

        return done[0].at[:, r].set(states), jax.tree.map(put, done[1], cache.stacks)

    states = jnp.zeros((batch, length, model.config.hidden_size), model.compute.dtype)
    cache = model.empty_cache(batch, length + capacity)
    done = by_shard(states), jax.tree.map(functools.partial(by_shard, axis=1), cache.stacks)
    done = jax.lax.fori_loop(0, batch // shards, one_row, done)
    states, stacks = jax.tree.map(lambda new, old: new.reshape(old.shape), done, (states, cache.stacks))
    cache = dataclasses.replace(cache, stacks=stacks)
    return states, cache.write(0, rows["positions"], rows["segments"])


@functools.partial(jax.jit, static_argnames=("sampling", "max_new_tokens", "capacity"))
def _prefill(model, rows, stops_V, sampling, seed, max_new_tokens, capacity):
    """Runs the prompts: the state of `_decode_steps`, with the first new token of each answer, and with slots
    for `capacity` of them."""
    batch, number = rows["ends"].shape
    states, cache = prefill(model, rows, capacity * number)
    last = jnp.take_along_axis(states, rows["ends"][..., None], axis=1)
    state = {
        "cache": cache,
        "prompt_slots": jnp.int32(rows["tokens"].shape[1]),
        "first": rows["lengths"],  # the position of the first new token
        "made": jnp.zeros((batch, number, max_new_tokens), jnp.int32),
        "lengths": jnp.zeros((batch, number), jnp.int32),
        "done": rows["done"],
        "step": jnp.int32(0),
        "seed": seed,
        "numbers": rows["numbers"],
    }
    return _constrain(_append_tokens(state, model.logits(last), stops_V, sampling))


@functools.partial(jax.jit, static_argnames="more")
def _grow_cache(state, more):
    """The state with slots for `more` new tokens of every text."""
    return _constrain(state | {"cache": state["cache"].grow(more * state["first"].shape[1])})


@functools.partial(jax.jit, donate_argnames="state", static_argnames="sampling")
def _decode_steps(model, state, stops_V, sampling, until):
    """New tokens up to the `until`-th, or until all answers have ended. The i-th of the r-th text is in slot
    T + i·R + r."""
    batch, number, _ = state["made"].shape
    segments = jnp.broadcast_to(own_segment(jnp.arange(number)), (batch, number))

    def body(state):
        last = state["step"] - 1
        rows = Rows(state["made"][:, :, last], state["first"] + last, segments)
        slot = state["prompt_slots"] + last * number
        (((states,),), _, cache) = model.forward(rows, cache=state["cache"], slot=slot)
        return _append_tokens(state | {"cache": cache}, model.logits(states), stops_V, sampling)

    def unfinished(state):
        return (state["step"] < until) & ~state["done"].all()

    return _constrain(jax.lax.while_loop(unfinished, body, state))


def _append_tokens(state, logits_BRV, stops_V, sampling):
    """The state with one more token in each answer that has not ended."""
    if sampling is None:
        tokens = logits_BRV.argmax(axis=-1).astype(jnp.int32)
    else:
        tokens = sampling.choose(logits_BRV, state["seed"], state["numbers"], state["step"])
        tokens = tokens.astype(jnp.int32)
    return state | {
        "made": state["made"].at[:, :, state["step"]].set(tokens),
        "lengths": state["lengths"] + ~state["done"],
        "done": state["done"] | stops_V[tokens],
        "step": state["step"] + 1,
    }


def _constrain(state):
    """The state as it is sharded: what is looked at from outside whole on every device, the rest by rows, and
    keys and values by heads besides. One layout, or `_decode_steps` would be compiled for each."""
    replicated = {
        name: constrain(state[name]) for name in ("made", "lengths", "done", "step", "prompt_slots", "seed")
    }
    tensor, cache = jax.sharding.get_abstract_mesh().shape["tensor"], state["cache"]

    def by_head(x):
        return constrain(x, None, BATCH, "tensor" if x.shape[2] % tensor == 0 else None)

    cache = dataclasses.replace(
        cache,
        stacks=jax.tree.map(by_head, cache.stacks),
        positions=constrain(cache.positions, BATCH),
        segments=constrain(cache.segments, BATCH),
    )
    by_row = {name: constrain(state[name], BATCH) for name in ("first", "numbers")}
    return replicated | by_row | {"cache": cache}
