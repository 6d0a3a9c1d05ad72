"""Granite 3: Llama with scales of embeddings, of scores, of what each part of a block adds, and of logits."""

from prom_jax.models.families import llama
from prom_jax.models.family import GGUF, Family


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    return {
        **llama.read(settings),
        "embedding_scale": settings.take_number("embedding_multiplier", 1.0),
        "residual_scale": settings.take_number("residual_multiplier", 1.0),
        "attention_scale": settings.take_number("attention_multiplier", 1.0),
        "logit_scale": 1 / settings.take_number("logits_scaling", 1.0),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    return {
        **llama.write(config),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


SETTINGS = {  # by the names in GGUF
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}


def gguf_settings(config) -> dict:
    """Settings in GGUF, the inverse of `gguf_keys`."""
    keys = write(config)
    return {name: float(keys[key]) for name, key in SETTINGS.items()}


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    scales = {key: settings[name] for name, key in SETTINGS.items() if name in settings}
    return {"model_type": "granite", **llama.gguf_biases(tensors), **scales}


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    tensors=llama.FAMILY.tensors,
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    read=read,
    write=write,
    gguf=GGUF("granite", gguf_keys, tuple(SETTINGS), gguf_settings, interleaved=True),
)
