"""What a run costs, known before any weight is loaded: FLOPs, bytes, and whether they fit."""

import os

import jax
import numpy as np

from prom_jax.models.config import LlamaConfig
from prom_jax.training.objective import Objective


def training_flops(config: LlamaConfig, objective: Objective, pivot_layer: int, records, examples) -> float:
    """Model FLOPs of training on `examples` (indices into `records`, repeated as they come).

    Two a multiply-add, three passes (forward, and backward in inputs and weights): 6 · parameters · tokens
    for matrices, causal attention, and a head for loss-bearing tokens alone. Padding and recomputation are
    not counted, as they are not the model's.
    """
    layers = config.num_hidden_layers
    total = _flops(config, layers, records.target_lengths[examples], records.target_weights[examples])
    if objective.uses_english:
        layers = pivot_layer if objective.has_pivot else layers
        total += _flops(config, layers, records.english_lengths[examples], records.english_weights[examples])
    return 3 * total


def _flops(config, layers, lengths, weights) -> float:
    """Forward FLOPs of examples of these lengths through some layers, and a head for their loss tokens."""
    hidden, attended = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = hidden * (2 * attended + 2 * keys + 3 * config.intermediate_size)
    lengths = lengths.astype(np.float64)
    window = np.minimum(lengths, config.sliding_window or np.inf)
    pairs = (lengths * window - window * (window - 1) / 2).sum()  # of a query and a key that it sees
    return layers * (2 * matrices * lengths.sum() + 4 * attended * pairs) + (
        2 * hidden * config.vocab_size * float(weights.sum())
    )


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
