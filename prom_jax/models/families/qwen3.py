"""Qwen 3: Llama with a norm of each head's queries and keys."""

from prom_jax.models.families import qwen2
from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, O_BIAS, OUTPUT, PROJECTIONS, QKV_BIASES
from prom_jax.models.family import GGUF, Family, in_layer

HEAD_NORMS = (
    in_layer("q_norm", ("head",), (None,), "self_attn.q_norm.weight", "attn_q_norm.weight"),
    in_layer("k_norm", ("head",), (None,), "self_attn.k_norm.weight", "attn_k_norm.weight"),
)


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    biases = bool(settings.take("attention_bias"))
    return {"layers": qwen2.read_layers(settings), "attention_bias": biases}


def write(config) -> dict:
    """Keys of `config.json`."""
    return {"attention_bias": config.attention_bias, **qwen2.write(config)}


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    return {"model_type": "qwen3", "attention_bias": "blk.0.attn_q.bias" in tensors}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *QKV_BIASES, O_BIAS, *HEAD_NORMS, *NORMS_BEFORE, *OUTPUT),
    defaults=qwen2.DEFAULTS | {"head_dim": 128},
    read=read,
    write=write,
    gguf=GGUF("qwen3", gguf_keys),
)
