"""Qwen 2 and 2.5: Llama with biases of q, k and v, and perhaps a sliding window in the upper layers."""

from prom_jax.models.config import LayerKind
from prom_jax.models.families.llama import EMBEDDING, NORMS_BEFORE, OUTPUT, PROJECTIONS, QKV_BIASES
from prom_jax.models.family import FULL, GGUF, SLIDING, Family, layer_type_keys, layers_of_types
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
    first, number = settings.take("max_window_layers"), settings["num_hidden_layers"]
    default = [SLIDING if i >= first else FULL for i in range(number)]
    return layers_of_types(settings, default, window if used else None)


def write(config) -> dict:
    """Keys of `config.json`."""
    rope, windows = rope_keys(config.layers[0].rope), [kind.window for kind in config.layers]
    if not any(windows):
        return {"use_sliding_window": False, **rope}
    first = next(i for i, window in enumerate(windows) if window)
    return {"use_sliding_window": True, "max_window_layers": first, **layer_type_keys(config), **rope}


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
