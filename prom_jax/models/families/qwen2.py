"""Qwen 2 and 2.5: Llama with biases of q, k and v, and perhaps a sliding window in the upper layers."""

from prom_jax.models.config import LayerKind
from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, OUTPUT, PROJECTIONS, QKV_BIASES
from prom_jax.models.family import GGUF, Family
from prom_jax.models.settings import rope_keys

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    return {"layers": read_layers(settings), "attention_bias": True}


def read_layers(settings) -> tuple[LayerKind, ...]:
    """The kind of each layer: with `use_sliding_window` those from `max_window_layers` on have a window."""
    used, window = settings.take("use_sliding_window"), settings.take("sliding_window")
    first, rope = settings.take("max_window_layers"), settings.take_rope()
    number = settings["num_hidden_layers"]
    types = settings.take("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(number)
    ]
    return tuple(LayerKind(window if used and kind == "sliding_attention" else None, rope) for kind in types)


def write(config) -> dict:
    """Keys of `config.json`."""
    windows = [kind.window for kind in config.layers]
    if not any(windows):
        return {"use_sliding_window": False, **rope_keys(config.layers[0].rope)}
    return {
        "use_sliding_window": True,
        "sliding_window": max(filter(None, windows)),
        "max_window_layers": windows.index(max(filter(None, windows))),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        **rope_keys(config.layers[0].rope),
    }


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF."""
    return {"model_type": "qwen2"}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *QKV_BIASES, *NORMS_BEFORE, *OUTPUT),
    defaults=DEFAULTS,
    read=read,
    write=write,
    gguf=GGUF("qwen2", gguf_keys),
)
