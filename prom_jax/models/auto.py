"""Which family a model is of, and its `config.json` in both directions."""

import functools
import importlib
import pkgutil

from prom_jax.models import families
from prom_jax.models.config import DecoderConfig
from prom_jax.models.family import Family
from prom_jax.models.settings import REQUIRED, Settings, check_kinds
from prom_jax.utils.errors import UserError


@functools.cache
def known_families() -> dict[str, Family]:
    """The families by `model_type`: the FAMILY of every module in models/families."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def family_of(config: DecoderConfig) -> Family:
    """The family of a model."""
    return known_families()[config.model_type]


def config_from_hf(hf: dict) -> DecoderConfig:
    """Reads the content of a `config.json`, of transformers 4 or 5.

    Raises:
      UserError: for an architecture, key or value that is not supported. Nothing is ignored but what cannot
        change the computation.
    """
    hf = dict(hf)
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
    fields["max_position_embeddings"] = settings.take("max_position_embeddings")
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


def _take_family(hf: dict) -> Family:
    """Removes what names the family."""
    model_type = hf.pop("model_type", None)
    check_kinds({"model_type": model_type})
    family = known_families().get(model_type)
    architectures = hf.pop("architectures", None) or [family and family.architecture]
    # The first exports of LLaMA spelled its name otherwise.
    if family is None or str(architectures).replace("LLaMA", "Llama") != str([family.architecture]):
        expected = ", ".join(family.architecture for family in known_families().values())
        raise UserError(
            f"unsupported architecture {architectures!r:.100} (model_type {model_type!r:.100}): expected one "
            f"of {expected}"
        )
    mapped = hf.get("auto_map")  # to code in the folder, which is never run
    if isinstance(mapped, dict) and str(mapped.get("AutoModelForCausalLM")).endswith(family.architecture):
        del hf["auto_map"]
    return family
