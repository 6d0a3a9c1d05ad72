"""Phi 3, 3.5 and 4 (mini): Llama whose queries, keys and values are one matrix, and gate and up another;
longer contexts by LongRoPE; perhaps a share of each head rotated, and a sliding window."""

from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, OUTPUT, PROJECTIONS
from prom_jax.models.family import GGUF, Family, in_layer, same_layers
from prom_jax.models.settings import rope_keys
from prom_jax.utils.errors import UserError

GATE_UP = in_layer(
    "gate_up_proj", ("gate and up", "hidden"), ("tensor", "fsdp"), "mlp.gate_up_proj.weight", "ffn_up.weight"
)
QKV = in_layer(
    "qkv_proj", ("queries, keys and values", "hidden"), ("tensor", "fsdp"),
    "self_attn.qkv_proj.weight", "attn_qkv.weight",
)  # fmt: skip
OUT_DOWN = tuple(row for row in PROJECTIONS if row.name in ("o_proj", "down_proj"))


def read(settings) -> dict:
    """Fields of `DecoderConfig`; raises UserError for dropout."""
    for key in ("resid_pdrop", "embd_pdrop"):
        if rate := settings.take(key):
            raise UserError(f"config.json sets {key}={rate!r:.100}, which is not supported: expected 0.0")
    window = settings.take("sliding_window")
    return {"layers": same_layers(settings, window, partial=True)}


def write(config) -> dict:
    """Keys of `config.json`."""
    kind = config.layers[0]
    keys = {"sliding_window": kind.window, **rope_keys(kind.rope)}
    scaling = kind.rope.scaling
    if scaling and scaling.rope_type == "longrope":
        original = scaling.original_max_position_embeddings
        keys["original_max_position_embeddings"] = original
        keys["max_position_embeddings"] = round(original * scaling.factor)
    return keys


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    return {"model_type": "phi3", "sliding_window": settings.get("attention.sliding_window") or None}


def gguf_settings(config) -> dict:
    """Settings in GGUF, where 0 stands for no window."""
    return {
        "attention.sliding_window": config.layers[0].window or 0,
        "rope.scaling.original_context_length": config.max_position_embeddings,
    }


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=(EMBEDDING, QKV, GATE_UP, *OUT_DOWN, *NORMS_BEFORE, *OUTPUT),
    defaults={
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
    },
    read=read,
    write=write,
    gguf=GGUF("phi3", gguf_keys, settings_of=gguf_settings, windows=False),
)  # fmt: skip
