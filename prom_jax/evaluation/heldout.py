"""Held-out loss: nats per token and bits per byte, in the target language and in English."""

import math

import jax

from prom_jax.data.loader import Batches
from prom_jax.models import decoder as llama
from prom_jax.ops import attention
from prom_jax.parallel.sharding import local_rows, place_rows
from prom_jax.training.objective import Objective, main_loss
from prom_jax.utils.console import track


class HeldOut:
    """Evaluates parameters on a set of held-out examples, each counted once.

    Args:
      model: abstract, the structure that parameters fill.
      objective: whose pivot exit is read, if it has one.
      mesh: of the parameters.
      records: the held-out examples; sequences, seq_len: shape of the batches.
      prefix: goes before the names of the results.
    """

    def __init__(self, model, objective: Objective, mesh, records, *, sequences, seq_len, prefix=""):
        share = attention.continues(model.compute.attention)
        self._batches = Batches.once(records, sequences=sequences, seq_len=seq_len, share_prompts=share)
        self._mesh, self._prefix = mesh, prefix
        self._tokens = {stream: int(texts.weights.sum()) for stream, texts in records.streams.items()}
        self._bytes = {stream: int(texts.bytes.sum()) for stream, texts in records.streams.items()}

        def sums(params, batch):
            whole = llama.with_params(model, params)
            results = {role: main_loss(whole, rows, objective.chunk) for role, rows in batch.items()}
            if objective.has_pivot and "english" in batch:
                results["pivot"] = objective.pivot_loss(whole, batch["english"])
            return results

        self._sums = jax.jit(sums)

    def __call__(self, params) -> dict[str, float]:
        """`eval_target_nats`, `eval_target_bits_per_byte`, the same for `english` (both at the last layer
        through the main head), and `eval_pivot_nats`, English at layer n through the pivot head.

        Nats are means over loss-bearing tokens, without smoothing; bits count the end-of-sequence token,
        bytes do not.
        """
        totals = {}
        here = {stream: local_rows(self._mesh, rows) for stream, (rows, _) in self._batches.shapes.items()}
        for batch in track(self._batches.iterate(0, here), "evaluating", len(self._batches)):
            sums = jax.device_get(self._sums(params, place_rows(self._mesh, batch)))
            totals = {key: totals.get(key, 0.0) + float(value) for key, value in sums.items()}
        results = {}
        for key, total in totals.items():
            role = "english" if key == "pivot" else key
            results[f"eval_{self._prefix}{key}_nats"] = total / self._tokens[role]
            if key != "pivot":
                bits = total / math.log(2) / self._bytes[role]
                results[f"eval_{self._prefix}{key}_bits_per_byte"] = bits
        return results
