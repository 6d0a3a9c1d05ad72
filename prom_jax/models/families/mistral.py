"""Mistral 7B and what followed it: Llama with a sliding window."""

import dataclasses

from prom_jax.models.families import llama
from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, OUTPUT, PROJECTIONS
from prom_jax.models.family import Family, same_layers
from prom_jax.models.settings import rope_keys


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    return {"layers": same_layers(settings, settings.take("sliding_window"))}


def write(config) -> dict:
    """Keys of `config.json`."""
    kind = config.layers[0]
    return {"sliding_window": kind.window, **rope_keys(kind.rope)}


def gguf_settings(config) -> dict:
    """Settings in GGUF, where the family is a Llama with a window."""
    return {"attention.sliding_window": config.layers[0].window}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *NORMS_BEFORE, *OUTPUT),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read=read,
    write=write,
    gguf=dataclasses.replace(llama.FORMAT, settings_of=gguf_settings, windows=False),
)
