"""How probable a model finds a given text: log-probabilities of continuations."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prom_jax.evaluation.batching import Batch, placed, plan
from prom_jax.evaluation.decode import SLOTS, prefill
from prom_jax.parallel.sharding import constrain, num_batch_shards

CHUNK = 32  # columns of each row whose logits are in memory at a time
NOBODY = -1


def score(
    model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, slots: int = SLOTS
) -> Iterator[tuple[int, float, bool]]:
    """log P(continuation | context) of pairs of token ids, the longest first.

    Prefixes that contexts share are computed once.

    Args:
      model: a `models.decoder.Decoder`; rows are spread over its mesh.
      pairs: contexts and continuations, none empty.
      slots: tokens that are computed at a time, over all devices.

    Yields:
      A pair's number, the sum over the continuation's tokens in nats, and whether each of these is the most
      probable one at its place.
    """
    inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
    own = [len(continuation) for _, continuation in pairs]
    shards = num_batch_shards(model.mesh)
    for batch in plan(inputs, own, extra=0, slots=slots, shards=shards):
        asked = _asked(batch, pairs)
        with jax.set_mesh(model.mesh):
            logs, best = map(np.asarray, _read(model, placed(model, batch, **asked)))
        for b, r in np.argwhere(batch.texts >= 0):
            mine = np.flatnonzero(asked["of"][b] == r)
            yield int(batch.texts[b, r]), float(logs[b, mine].sum(dtype=float)), bool(best[b, mine].all())


def _asked(batch: Batch, pairs) -> dict[str, np.ndarray]:
    """What is read of each row, int32 [B, M], M a multiple of CHUNK: the column, the token whose probability
    is asked there, and of which of its texts it is."""
    number = -(-max(_num_tokens(pairs, texts) for texts in batch.texts) // CHUNK) * CHUNK
    at, labels, of = (np.full((len(batch.texts), number), fill, np.int32) for fill in (0, 0, NOBODY))
    for b, texts in enumerate(batch.texts):
        end = 0
        for r in np.flatnonzero(texts >= 0):
            continuation = pairs[texts[r]][1]
            here = slice(end, end := end + len(continuation))
            labels[b, here], of[b, here] = continuation, r
            at[b, here] = batch.ends[b, r] + np.arange(1 - len(continuation), 1)
    return {"at": at, "labels": labels, "of": of}


def _num_tokens(pairs, texts) -> int:
    return sum(len(pairs[text][1]) for text in texts if text >= 0)


@jax.jit
def _read(model, rows):
    """Log-probabilities of the labels and whether they are the most probable, [B, M], on every device."""
    states, _ = prefill(model, rows)
    states = jnp.take_along_axis(states, rows["at"][..., None], axis=1)

    def read(part):
        states_BCD, labels_BC = part
        logits_BCV = model.logits(states_BCD)
        asked = jnp.take_along_axis(logits_BCV, labels_BC[..., None], axis=-1)[..., 0]
        best = logits_BCV.argmax(axis=-1) == labels_BC
        return asked - jax.nn.logsumexp(logits_BCV, axis=-1), best

    def chunks(x):
        return x.reshape(len(x), -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    def whole(x):
        return constrain(x.swapaxes(0, 1).reshape(rows["labels"].shape))

    return jax.tree.map(whole, jax.lax.map(read, (chunks(states), chunks(rows["labels"]))))
