"""GLM 4: norms before and after attention and MLP, biases of q, k and v, gate and up as one matrix, and half
of each head rotated, neighbours into each other."""

import dataclasses

from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, OUTPUT, PROJECTIONS, QKV_BIASES
from prom_jax.models.families.phi3 import GATE_UP
from prom_jax.models.family import GGUF, Family, in_layer, same_layers
from prom_jax.models.settings import rope_keys

SHARE = 0.5
ATTENTION_DOWN = tuple(row for row in PROJECTIONS if row.name not in ("gate_proj", "up_proj"))
NORMS_AFTER = (
    in_layer("attention_out_norm", ("hidden",), ("fsdp",),
             "post_self_attn_layernorm.weight", "post_attention_norm.weight"),
    in_layer("mlp_out_norm", ("hidden",), ("fsdp",), "post_mlp_layernorm.weight", "post_ffw_norm.weight"),
)  # fmt: skip


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    layers = same_layers(settings, partial=True)
    rope = layers[0].rope and dataclasses.replace(layers[0].rope, interleaved=True)
    return {
        "layers": (dataclasses.replace(layers[0], rope=rope),) * len(layers),
        "attention_bias": bool(settings.take("attention_bias")),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    rope = config.layers[0].rope
    return {"attention_bias": config.attention_bias, **rope_keys(rope), "partial_rotary_factor": rope.share}


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    return {"model_type": "glm4", "attention_bias": "blk.0.attn_q.bias" in tensors}


FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    tensors=(EMBEDDING, *ATTENTION_DOWN, GATE_UP, *QKV_BIASES, *NORMS_BEFORE, *NORMS_AFTER, *OUTPUT),
    defaults={
        "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7, "attention_bias": True, "partial_rotary_factor": SHARE,
        "pad_token_id": 151329, "eos_token_id": [151329, 151336, 151338],
    },
    read=read,
    write=write,
    gguf=GGUF("glm4", gguf_keys),
)  # fmt: skip
