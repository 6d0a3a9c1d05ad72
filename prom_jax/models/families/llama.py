"""Llama 1, 2 and 3, and models of its architecture: SmolLM2, TinyLlama …"""

from prom_jax.models.family import GGUF, HEAD_AXES, HEAD_SHAPE, Family, Tensor, in_layer, same_layers
from prom_jax.models.settings import rope_keys
from prom_jax.utils.errors import UserError

EMBEDDING = Tensor("embed_tokens", HEAD_SHAPE, HEAD_AXES, "model.embed_tokens.weight", "token_embd.weight")
PROJECTIONS = (
    in_layer("q_proj", ("queries", "hidden"), ("tensor", "fsdp"), "self_attn.q_proj.weight", "attn_q.weight"),
    in_layer("k_proj", ("keys", "hidden"), ("tensor", "fsdp"), "self_attn.k_proj.weight", "attn_k.weight"),
    in_layer("v_proj", ("keys", "hidden"), ("tensor", "fsdp"), "self_attn.v_proj.weight", "attn_v.weight"),
    in_layer("o_proj", ("hidden", "queries"), ("fsdp", "tensor"),
             "self_attn.o_proj.weight", "attn_output.weight"),
    in_layer("gate_proj", ("inner", "hidden"), ("tensor", "fsdp"), "mlp.gate_proj.weight", "ffn_gate.weight"),
    in_layer("up_proj", ("inner", "hidden"), ("tensor", "fsdp"), "mlp.up_proj.weight", "ffn_up.weight"),
    in_layer("down_proj", ("hidden", "inner"), ("fsdp", "tensor"), "mlp.down_proj.weight", "ffn_down.weight"),
)  # fmt: skip
QKV_BIASES = (
    in_layer("q_bias", ("queries",), ("tensor",), "self_attn.q_proj.bias", "attn_q.bias", "attention_bias"),
    in_layer("k_bias", ("keys",), ("tensor",), "self_attn.k_proj.bias", "attn_k.bias", "attention_bias"),
    in_layer("v_bias", ("keys",), ("tensor",), "self_attn.v_proj.bias", "attn_v.bias", "attention_bias"),
)
O_BIAS = in_layer(
    "o_bias", ("hidden",), ("fsdp",), "self_attn.o_proj.bias", "attn_output.bias", "attention_bias"
)
MLP_BIASES = (
    in_layer("gate_bias", ("inner",), ("tensor",), "mlp.gate_proj.bias", "ffn_gate.bias", "mlp_bias"),
    in_layer("up_bias", ("inner",), ("tensor",), "mlp.up_proj.bias", "ffn_up.bias", "mlp_bias"),
    in_layer("down_bias", ("hidden",), ("fsdp",), "mlp.down_proj.bias", "ffn_down.bias", "mlp_bias"),
)
NORMS_BEFORE = (
    in_layer("attention_norm", ("hidden",), ("fsdp",), "input_layernorm.weight", "attn_norm.weight"),
    in_layer("mlp_norm", ("hidden",), ("fsdp",), "post_attention_layernorm.weight", "ffn_norm.weight"),
)
OUTPUT = (
    Tensor("norm", ("hidden",), ("fsdp",), "model.norm.weight", "output_norm.weight"),
    Tensor("lm_head", HEAD_SHAPE, HEAD_AXES, "lm_head.weight", "output.weight", "untied"),
)


def read(settings) -> dict:
    """Fields of `DecoderConfig`; raises UserError for a sliding window."""
    if (window := settings.take("sliding_window")) is not None:
        raise UserError(
            f"sliding_window={window}: a model of type 'llama' has none; remove the key from config.json, or "
            "make it a 'mistral'"
        )
    return {
        "layers": same_layers(settings),
        "attention_bias": bool(settings.take("attention_bias")),
        "mlp_bias": bool(settings.take("mlp_bias")),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return rope_keys(config.layers[0].rope) | {key: True for key, value in biases.items() if value}


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF, whose 'llama' is a Mistral where it has a sliding window."""
    if window := settings.get("attention.sliding_window"):
        return {"model_type": "mistral", "sliding_window": window}
    return {"model_type": "llama", **gguf_biases(tensors)}


def gguf_biases(tensors) -> dict:
    """Keys of `config.json` for the biases that a GGUF file has."""
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {key: True for key, name in biases.items() if name in tensors}


FORMAT = GGUF("llama", gguf_keys, interleaved=True)
FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *QKV_BIASES, O_BIAS, *MLP_BIASES, *NORMS_BEFORE, *OUTPUT),
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    read=read,
    write=write,
    gguf=FORMAT,
)
