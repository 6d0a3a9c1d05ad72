"""Gemma 2: norms by 1 + weight before and after attention and MLP, GELU, soft caps of scores and logits, and
a sliding window in every other layer."""

from prom_jax.models.families.llama import EMBEDDING, OUTPUT, PROJECTIONS
from prom_jax.models.family import FULL, GGUF, SLIDING, Family, in_layer, layer_type_keys, layers_of_types
from prom_jax.models.settings import rope_keys
from prom_jax.utils.errors import UserError

NORMS = (
    in_layer("attention_norm", ("hidden",), ("fsdp",), "input_layernorm.weight", "attn_norm.weight"),
    in_layer("attention_out_norm", ("hidden",), ("fsdp",),
             "post_attention_layernorm.weight", "post_attention_norm.weight"),
    in_layer("mlp_norm", ("hidden",), ("fsdp",), "pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    in_layer("mlp_out_norm", ("hidden",), ("fsdp",),
             "post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
)  # fmt: skip
ACTIVATION = "gelu_pytorch_tanh"
LAYERS_OF_27B = 46


def read_common(settings) -> dict:
    """Fields of `DecoderConfig` that Gemma 3 has too; raises UserError for another activation."""
    settings.take("hidden_act")  # older files have it too; the other one counts
    if (activation := settings.take("hidden_activation", ACTIVATION)) != ACTIVATION:
        raise UserError(f"hidden_activation={activation!r:.100}: expected {ACTIVATION!r}")
    return {
        "unit_offset_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": settings["hidden_size"] ** 0.5,
        "attention_scale": settings.take_number("query_pre_attn_scalar", 256) ** -0.5,
    }


def read(settings) -> dict:
    """Fields of `DecoderConfig`; raises UserError for another activation, and for two windows."""
    types = [FULL if i % 2 else SLIDING for i in range(settings["num_hidden_layers"])]
    window = settings.take("sliding_window")
    if (again := settings.take("sliding_window_size", window)) != window:  # published files say it twice
        raise UserError(
            f"config.json sets sliding_window={window} and sliding_window_size={again!r:.100}: expected one "
            "window; remove the one that is wrong"
        )
    return {
        "layers": layers_of_types(settings, types, window),
        **read_common(settings),
        "attention_softcap": settings.take_number("attn_logit_softcapping", 50.0, optional=True),
        "logit_softcap": settings.take_number("final_logit_softcapping", 30.0, optional=True),
    }


def write_common(config) -> dict:
    """Keys of `config.json` that Gemma 3 has too."""
    query_scale = round(config.attention_scale**-2, 6)
    return {
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": int(query_scale) if query_scale.is_integer() else query_scale,
        **layer_type_keys(config),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    return {
        **write_common(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        **rope_keys(config.layers[0].rope),
    }


def gguf_query_scale(settings, layers_of_largest: int) -> dict:
    """What queries are scaled by, which GGUF does not say: in the largest model it is not the head's size."""
    if settings["block_count"] == layers_of_largest:
        return {"query_pre_attn_scalar": settings["embedding_length"] / settings["attention.head_count"]}
    size = settings.get("attention.key_length")
    return {} if size is None else {"query_pre_attn_scalar": size}


def gguf_settings(config) -> dict:
    """Settings in GGUF, the inverse of `gguf_keys`; the scale of queries follows from the sizes."""
    return {
        "attention.sliding_window": layer_type_keys(config)["sliding_window"],
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    names = {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    keys = {key: settings[name] for key, name in names.items() if name in settings}
    return {"model_type": "gemma2", **gguf_query_scale(settings, LAYERS_OF_27B), **keys}


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *NORMS, *OUTPUT),
    defaults={
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    },
    read=read,
    write=write,
    gguf=GGUF("gemma2", gguf_keys, ("attn_logit_softcapping", "final_logit_softcapping"), gguf_settings,
              norms_with_offset=True),
)  # fmt: skip
