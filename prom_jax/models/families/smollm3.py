"""SmolLM 3: Llama with layers that know no positions, by default every fourth one."""

import dataclasses

from prom_jax.models.families import llama
from prom_jax.models.family import FULL, GGUF, SLIDING, Family, layer_type_keys, layers_of_types
from prom_jax.models.settings import rope_keys
from prom_jax.utils.errors import UserError


def read(settings) -> dict:
    """Fields of `DecoderConfig`; raises UserError for a list of layers that is not one of 0s and 1s."""
    number, interval = settings["num_hidden_layers"], settings.take_number("no_rope_layer_interval", 4)
    # Against its name, 1 stands for a layer that has rotary embeddings.
    default = [int((i + 1) % interval != 0) for i in range(number)]
    rotated = settings.take("no_rope_layers") or default
    if not isinstance(rotated, list) or len(rotated) != number or any(flag not in (0, 1) for flag in rotated):
        raise UserError(f"no_rope_layers={rotated!r:.100}: expected 0 or 1 for each of {number} layers")
    settings.take("max_window_layers")  # published files have it; it means nothing in this family
    used, window = settings.take("use_sliding_window"), settings.take("sliding_window")
    window = window if used else None
    types = [FULL if flag or not window else SLIDING for flag in rotated]
    layers = layers_of_types(settings, types, window)
    return {
        "layers": tuple(
            kind if flag else dataclasses.replace(kind, rope=None) for kind, flag in zip(layers, rotated)
        ),
        "attention_bias": bool(settings.take("attention_bias")),
        "mlp_bias": bool(settings.take("mlp_bias")),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    ropes = [kind.rope for kind in config.layers]
    windows = layer_type_keys(config)
    return {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(rope is not None) for rope in ropes],
        "use_sliding_window": windows["sliding_window"] is not None,
        **windows,
        **(rope_keys(next(filter(None, ropes))) if any(ropes) else {}),
    }


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF, where every fourth layer is without positions."""
    return {"model_type": "smollm3", **llama.gguf_biases(tensors)}


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    tensors=llama.FAMILY.tensors,
    defaults={
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
        "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
    },
    read=read,
    write=write,
    gguf=GGUF("smollm3", gguf_keys, interleaved=True),
)  # fmt: skip
