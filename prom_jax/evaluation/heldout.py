"""Held-out loss: nats per token and bits per byte, of every stream."""

import dataclasses
import math

import jax

from prom_jax.data.loader import Batches
from prom_jax.models import decoder
from prom_jax.ops import attention
from prom_jax.parallel.sharding import local_rows, num_batch_shards, place_rows
from prom_jax.training.objective import MAIN_HEAD, L, Method, TokenLoss, head_chunks, token_losses
from prom_jax.utils.console import track


class HeldOut:
    """Evaluates parameters on a set of held-out examples, each counted once.

    Args:
      model: abstract, the structure that parameters fill.
      method: whose earlier exits and further heads are read, if it has some.
      mesh: of the parameters.
      records: the held-out examples.
      sequences, seq_len: shape of the batches.
      prefix: goes before the names of the results.
    """

    def __init__(self, model, method: Method, mesh, records, *, sequences, seq_len, prefix=""):
        share = attention.supports_shared_prefixes(model.compute.attention)
        self._batches = Batches.once(records, sequences=sequences, seq_len=seq_len, share_prompts=share)
        self._mesh, self._prefix = mesh, prefix
        self._main = tuple(self._batches.shapes)  # read at the last layer through the main head
        self._losses = {stream: (stream, L(stream)) for stream in self._main}
        for term in method.terms:
            if (
                isinstance(term, TokenLoss)
                and (term.head, term.layer) != (MAIN_HEAD, None)
                and term.streams[0] in self._main
            ):
                name = "pivot" if term.head == MAIN_HEAD else term.head.removesuffix("_head")
                self._losses[name] = term.streams[0], dataclasses.replace(term, label_smoothing=0.0)
        self._tokens = {stream: int(texts.weights.sum()) for stream, texts in records.streams.items()}
        self._bytes = {stream: int(texts.bytes.sum()) for stream, texts in records.streams.items()}

        chunks = head_chunks(self._batches, num_batch_shards(mesh))

        def sums(params, batch):
            whole = decoder.with_params(model, params)
            return {
                name: token_losses(whole, {stream: batch[stream]}, [loss], chunks=chunks)[stream]
                for name, (stream, loss) in self._losses.items()
            }

        self._sums = jax.jit(sums)

    def __call__(self, params) -> dict[str, float]:
        """`eval_target_nats`, `eval_target_bits_per_byte`, the same for every other stream (all at the last
        layer through the main head), and `eval_pivot_nats`, English at layer n through the pivot head (or
        the main one, where the method reads it there).

        Nats are means over loss tokens, without smoothing; bits count the end-of-sequence token, bytes do
        not.
        """
        totals = {}
        here = {stream: local_rows(self._mesh, rows) for stream, (rows, _) in self._batches.shapes.items()}
        for batch in track(self._batches.iterate(0, here), "evaluating", len(self._batches)):
            sums = jax.device_get(self._sums(params, place_rows(self._mesh, batch)))
            totals = {key: totals.get(key, 0.0) + float(value) for key, value in sums.items()}
        results = {}
        for key, total in totals.items():
            stream, _ = self._losses[key]
            results[f"eval_{self._prefix}{key}_nats"] = total / self._tokens[stream]
            if key in self._main:
                bits = total / math.log(2) / self._bytes[stream]
                results[f"eval_{self._prefix}{key}_bits_per_byte"] = bits
        return results
