"""OLMo 3: OLMo 2 with a sliding window in three of four layers; a rope scaling is of the others alone."""

from prom_jax.models.families import olmo2
from prom_jax.models.family import FULL, SLIDING, Family, layer_type_keys, layers_of_types
from prom_jax.models.settings import rope_keys_by_type

THETA_KEYS = {FULL: "rope_theta", SLIDING: "rope_theta"}


def read(settings) -> dict:
    """Fields of `DecoderConfig`."""
    types = [SLIDING if (i + 1) % 4 else FULL for i in range(settings["num_hidden_layers"])]
    window, ropes = settings.take("sliding_window"), settings.take_ropes(THETA_KEYS)
    return {
        "layers": layers_of_types(settings, types, window, ropes),
        "attention_bias": bool(settings.take("attention_bias")),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    ropes = {SLIDING if kind.window else FULL: kind.rope for kind in config.layers}
    return {
        "attention_bias": config.attention_bias,
        **layer_type_keys(config),
        **rope_keys_by_type(ropes, THETA_KEYS),
    }


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    tensors=olmo2.FAMILY.tensors,
    defaults=olmo2.FAMILY.defaults | {"sliding_window": 4096, "rope_theta": 5e5},
    read=read,
    write=write,
)
