"""What a run costs, known before any weight is loaded: FLOPs, bytes, and whether they fit."""

import math
import os
from collections import Counter

import jax
import numpy as np

from prom_jax.models.config import DecoderConfig
from prom_jax.models.decoder import tensors
from prom_jax.models.lora import LoRA
from prom_jax.training.objective import MAIN_HEAD, Method, TokenLoss


def training_flops(
    config: DecoderConfig, method: Method, records, examples, lora: LoRA | None = None
) -> float:
    """Model FLOPs of training on examples.

    Two a multiply-add, three passes (forward, and backward in inputs and weights): 6 · parameters · tokens
    for matrices, causal attention, and a head for loss tokens alone; two passes for a head that does not
    learn and for matrices that are frozen, whose adapters have three, and for a method that combines
    gradients (`Method.combine`) a way back through the blocks for each of them. Padding and recomputation are
    not counted, as they are not the model's.

    Args:
      config: of the model.
      method: which streams go through how many blocks; only its `TokenLoss`es are counted.
      records: of `data.records`.
      examples: indices into the records, repeated as they come.
      lora: the adapters; None for none.

    Returns:
      A number of operations.
    """
    exits = [term for term in method.terms if isinstance(term, TokenLoss)]
    gradients = sum(len(term.names) for term in method.terms) if method.combine else 1
    return sum(
        _of_blocks(config, term.layer, records.streams[stream], examples, gradients, lora)
        + _of_head(config, term, records.streams[stream], examples, lora)
        for term in exits
        for stream in term.streams
        if stream in records.streams
    )


def _of_blocks(config: DecoderConfig, layer: int | None, texts, examples, gradients: int, lora) -> float:
    """FLOPs of one stream of examples through some layers, and back so many times."""
    lengths = texts.lengths[examples].astype(np.float64)
    layers = config.layers[:layer]
    passes, is_frozen = 1 + 2 * gradients, lora is not None and not lora.trains_base
    of_matrices = (1 + gradients if is_frozen else passes) * _matrices(config) + passes * _adapters(
        config, lora
    )
    pairs = sum(number * _attended(lengths, window) for window, number in _counts(layers).items())
    return len(layers) * 2 * of_matrices * lengths.sum() + passes * 4 * config.sizes["queries"] * pairs


def _of_head(config: DecoderConfig, term: TokenLoss, texts, examples, lora) -> float:
    """FLOPs of a head on the loss tokens of one stream of examples."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    low_rank = lora is not None and term.head in lora.heads
    is_frozen = lora is not None and not lora.trains_base and term.head == MAIN_HEAD
    values = (3 if term.trains_head and not low_rank and not is_frozen else 2) * hidden * vocabulary
    values += 3 * lora.rank * (hidden + vocabulary) if low_rank else 0
    return 2 * values * float(texts.weights[examples].sum())


def _matrices(config: DecoderConfig) -> int:
    """The number of values in a block's matrices."""
    hidden, queries, keys = (config.sizes[name] for name in ("hidden", "queries", "keys"))
    return hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)


def _adapters(config: DecoderConfig, lora: LoRA | None) -> int:
    """The number of values in a block's adapters."""
    if lora is None:
        return 0
    rows = lora.rows(row for row in tensors(config) if row.in_layers)
    sizes = config.sizes | {"rank": lora.rank}
    return sum(math.prod(sizes[size] for size in row.shape) for row in rows)


def _counts(layers) -> Counter:
    """How many layers have each window."""
    return Counter(kind.window for kind in layers)


def _attended(lengths, window: int | None) -> float:
    """Pairs of a query and a key that it attends to, in texts of these lengths."""
    window = np.minimum(lengths, window or np.inf)
    return (lengths * window - window * (window - 1) / 2).sum()


def device_bytes(compiled) -> dict[str, int]:
    """Bytes a device that a compiled update holds: 'state' (parameters, optimizer, batch) and 'temporary'."""
    memory = compiled.memory_analysis()
    return {
        "state": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def available_bytes() -> int:
    """Bytes that each local device may use: its own memory, or its share of the host's on CPU."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // jax.local_device_count()


def summary(needed: dict[str, int]) -> str:
    """One line: what is needed on each device, what there is, and whether it fits."""
    total, there = sum(needed.values()), available_bytes()
    verdict = (
        "fits" if total <= there else "DOES NOT FIT: set remat=full, raise batch.accumulation, or add devices"
    )
    return (
        f"{total / 2**30:.2f} GiB a device (state {needed['state'] / 2**30:.2f}, temporary "
        f"{needed['temporary'] / 2**30:.2f}) of {there / 2**30:.2f}: {verdict}"
    )
