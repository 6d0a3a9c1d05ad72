"""Gemma 3: Gemma 2 with norms of each head's queries and keys in place of soft caps, a window
in five of six layers, and a rotary base for either kind."""

from prom_jax.models.families import gemma2
from prom_jax.models.families.llama import EMBEDDING, OUTPUT, PROJECTIONS
from prom_jax.models.families.qwen3 import HEAD_NORMS
from prom_jax.models.family import FULL, GGUF, SLIDING, Family, Multimodal, layers_of_types
from prom_jax.models.settings import rope_keys_by_type
from prom_jax.utils.errors import UserError

THETA_KEYS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
LAYERS_OF_27B = 62


def read(settings) -> dict:
    """Fields of `DecoderConfig`.

    Raises:
      UserError: for another activation, a soft cap of scores, or no window.
    """
    if settings.take("attn_logit_softcapping") is not None:  # transformers has the key and leaves it out
        raise UserError(
            "config.json sets attn_logit_softcapping: expected null, as the family has no such cap"
        )
    settings.take("_sliding_window_pattern")  # of transformers 5, which always says the layers' types too
    pattern = settings.take("sliding_window_pattern", 6)
    types = [SLIDING if (i + 1) % pattern else FULL for i in range(settings["num_hidden_layers"])]
    window, ropes = (
        settings.take_number("sliding_window", 4096),
        settings.take_ropes(THETA_KEYS),
    )
    return {
        "layers": layers_of_types(settings, types, window, ropes),
        "logit_softcap": settings.take_number("final_logit_softcapping", None, optional=True),
        **gemma2.read_common(settings),
    }


def write(config) -> dict:
    """Keys of `config.json`."""
    ropes = {SLIDING if kind.window else FULL: kind.rope for kind in config.layers}
    keys = {
        "final_logit_softcapping": config.logit_softcap,
        **gemma2.write_common(config),
        **rope_keys_by_type(ropes, THETA_KEYS),
    }
    if SLIDING not in ropes:  # without a local layer a window says nothing, and null is refused
        del keys["sliding_window"]
    return keys


def gguf_settings(config) -> dict:
    """Settings in GGUF, the inverse of `gguf_keys`."""
    full = [i for i, kind in enumerate(config.layers, 1) if not kind.window]
    local = next((kind.rope for kind in config.layers if kind.window), None)
    return {
        **gemma2.gguf_settings(config),
        "attention.sliding_window_pattern": full[0] if full else len(config.layers) + 1,
        "rope.freq_base_swa": local and local.theta,
    }


def gguf_keys(settings, tensors) -> dict:
    """Keys of `config.json` from GGUF; what it leaves out is as in the published models."""
    names = {
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "rope_local_base_freq": "rope.freq_base_swa",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    keys = {key: settings[name] for key, name in names.items() if name in settings}
    return {"model_type": "gemma3_text", **gemma2.gguf_query_scale(settings, LAYERS_OF_27B), **keys}


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=(EMBEDDING, *PROJECTIONS, *HEAD_NORMS, *gemma2.NORMS, *OUTPUT),
    defaults={
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "sliding_window": 4096, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
        "pad_token_id": 0,
    },
    read=read,
    write=write,
    gguf=GGUF(
        "gemma3", gguf_keys,
        ("attention.sliding_window_pattern", "rope.freq_base_swa", "final_logit_softcapping"), gguf_settings,
        norms_with_offset=True,
    ),
    multimodal=Multimodal(
        model_type="gemma3",
        architecture="Gemma3ForConditionalGeneration",
        keys=("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
              "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id"),
        renames=(("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
                 ("model.language_model.", "model.")),
        others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                "model.multi_modal_projector."),
    ),
)  # fmt: skip
