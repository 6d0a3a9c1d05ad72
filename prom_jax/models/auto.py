"""Which family a model is of, and its `config.json` in both directions."""

import functools
import importlib
import pkgutil

from prom_jax.models import families
from prom_jax.models.config import DecoderConfig
from prom_jax.models.family import Family, Multimodal
from prom_jax.models.known_keys import check_kinds
from prom_jax.models.settings import REQUIRED, Settings
from prom_jax.utils.errors import UserError


@functools.cache
def known_families() -> dict[str, Family]:
    """The families by `model_type`: the FAMILY of every module in models/families."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def multimodal_of(model_type) -> Multimodal | None:
    """The multimodal models of that `model_type` whose language model is of a family known here."""
    candidates = (family.multimodal for family in known_families().values() if family.multimodal)
    return next((model for model in candidates if model.model_type == model_type), None)


def family_of(config: DecoderConfig) -> Family:
    """The family of a model."""
    return known_families()[config.model_type]


def config_from_hf(hf: dict) -> DecoderConfig:
    """Reads the content of a `config.json`, of transformers 4 or 5. Of a multimodal model it is the
    architecture of the language model.

    Args:
      hf: the content.

    Returns:
      The architecture.

    Raises:
      UserError: for an architecture, key or value that is not supported. Nothing is ignored but what cannot
        change the computation.
    """
    hf = _text_config(dict(hf))
    family = _take_family(hf)
    settings = Settings(hf, family.defaults)
    fields = {key: settings.take(key) for key in REQUIRED}
    heads, eos = fields["num_attention_heads"], settings.take("eos_token_id")
    fields |= {
        "num_key_value_heads": settings.take("num_key_value_heads") or heads,
        "head_dim": settings.take("head_dim") or fields["hidden_size"] // heads,
        "rms_norm_eps": float(settings.take("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": settings.take("tie_word_embeddings", False),
        "bos_token_id": settings.take("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": settings.take("pad_token_id"),
    }
    fields |= family.read(settings)  # before the length, which a rope scaling may refer to
    longest = settings.take("max_position_embeddings")
    # Beyond its original context the frequencies of this scaling are others, also of the tokens before.
    scalings = [kind.rope.scaling for kind in fields["layers"] if kind.rope and kind.rope.scaling]
    originals = [s.original_max_position_embeddings for s in scalings if s.rope_type == "longrope"]
    fields["max_position_embeddings"] = min([longest, *originals])
    return DecoderConfig(**fields, model_type=family.model_type, skipped=settings.finish())


def config_to_hf(config: DecoderConfig) -> dict:
    """The content of a `config.json` that transformers 4 and 5 both read."""
    family = family_of(config)
    common = (*REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
              "tie_word_embeddings", "bos_token_id", "pad_token_id", "model_type")  # fmt: skip
    eos = config.eos_token_id
    return {
        **{key: getattr(config, key) for key in common},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "architectures": [family.architecture],
        "hidden_act": "silu",
        **family.write(config),
    }


def _text_config(hf: dict) -> dict:
    """The language model's part of a multimodal model's `config.json`, with the keys of the whole that say
    something of it; any other model's as it is."""
    check_kinds({"model_type": hf.get("model_type")})
    multimodal = multimodal_of(hf.get("model_type"))
    if multimodal is None:
        return hf
    architectures = hf.pop("architectures", None)
    if architectures not in (None, [multimodal.architecture]):
        raise UserError(
            f"unsupported architecture {architectures!r:.100} (model_type {multimodal.model_type!r}): "
            f"expected {multimodal.architecture}"
        )
    check_kinds(hf)
    text = dict(hf.pop("text_config", {}))
    text.pop("architectures", None)  # of whichever class the language model was taken from
    of_parts = ("model_type", *multimodal.keys)
    of_whole = {key: value for key, value in hf.items() if key not in of_parts and value is not None}
    (expected,) = (name for name, family in known_families().items() if family.multimodal is multimodal)
    if (model_type := text.pop("model_type", expected)) != expected:
        raise UserError(
            f"text_config of a {multimodal.model_type!r} has model_type {model_type!r:.100}: expected "
            f"{expected!r}"
        )
    return {"model_type": expected, **text, **of_whole}


def _take_family(hf: dict) -> Family:
    """Removes what names the family."""
    model_type = hf.pop("model_type", None)
    check_kinds({"model_type": model_type})
    family = known_families().get(model_type)
    architectures = hf.pop("architectures", None) or [family and family.architecture]
    # The first exports of LLaMA spelled its name otherwise.
    if family is None or str(architectures).replace("LLaMA", "Llama") != str([family.architecture]):
        families = known_families().values()
        known = [family.architecture for family in families]
        known += [family.multimodal.architecture for family in families if family.multimodal]
        expected = ", ".join(sorted(known))
        raise UserError(
            f"unsupported architecture {architectures!r:.100} (model_type {model_type!r:.100}): expected one "
            f"of {expected}"
        )
    mapped = hf.get("auto_map")  # to code in the folder, which is never run
    if isinstance(mapped, dict) and str(mapped.get("AutoModelForCausalLM")).endswith(family.architecture):
        del hf["auto_map"]
    return family
