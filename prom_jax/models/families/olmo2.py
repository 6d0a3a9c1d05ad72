"""OLMo 2: Llama with norms after attention and MLP, not before, and norms of all queries and of all keys."""

from prom_jax.models.families.llama import EMBEDDING, O_BIAS, OUTPUT, PROJECTIONS, QKV_BIASES
from prom_jax.models.family import GGUF, Family, in_layer, same_layers
from prom_jax.models.settings import rope_keys

NORMS = (
    in_layer("q_norm", ("queries",), ("tensor",), "self_attn.q_norm.weight", "attn_q_norm.weight"),
    in_layer("k_norm", ("keys",), ("tensor",), "self_attn.k_norm.weight", "attn_k_norm.weight"),
    in_layer("attention_out_norm", ("hidden",), ("fsdp",),
             "post_attention_layernorm.weight", "post_attention_norm.weight"),
    in_layer("mlp_out_norm", ("hidden",), ("fsdp",),
             "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)  # fmt: skip


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    return {"layers": same_layers(settings), "attention_bias": bool(settings.take("attention_bias"))}


def write(config) -> dict:
    """Keys of `config.json`."""
    return {"attention_bias": config.attention_bias, **rope_keys(config.layers[0].rope)}


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    return {"model_type": "olmo2", "attention_bias": "blk.0.attn_q.bias" in tensors}


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *QKV_BIASES, O_BIAS, *NORMS, *OUTPUT),
    defaults={
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279,
    },
    read=read,
    write=write,
    gguf=GGUF("olmo2", gguf_keys),
)  # fmt: skip
