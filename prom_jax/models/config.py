"""The architecture of a model, read from and written to a Hugging Face `config.json`."""

import dataclasses

from prom_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for a longer context: `linear` by `factor`, `llama3` by wavelength."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture, in the terms of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; check the model's config.json"
            )
        if self.head_dim % 2 or not self.head_dim:
            raise UserError(
                f"head_dim={self.head_dim}: rotary embeddings need an even number; check the model's "
                "config.json"
            )
        if self.model_type == "llama" and self.sliding_window is not None:
            raise UserError(
                f"sliding_window={self.sliding_window}: a model of type 'llama' has none; remove the "
                "key from config.json, or make it a 'mistral'"
            )

    @classmethod
    def from_hf(cls, hf: dict) -> "LlamaConfig":
        """Reads the content of a `config.json`, of transformers 4 or 5.

        Raises:
          UserError: for an architecture, key or value that this model does not compute. Nothing is
            ignored but what cannot change the computation.
        """
        hf = dict(hf)
        _check_kinds(hf)
        model_type = hf.pop("model_type", None)
        architectures = hf.pop("architectures", None) or [_ARCHITECTURE.get(model_type)]
        if model_type not in _ARCHITECTURE or architectures != [_ARCHITECTURE[model_type]]:
            raise UserError(
                f"unsupported architecture {architectures!r:.100} (model_type {model_type!r:.100}): "
                f"expected one of {', '.join(_ARCHITECTURE.values())}"
            )
        missing = [key for key in _REQUIRED if key not in hf]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; is it a whole model's config?")
        fields = {key: hf.pop(key) for key in _REQUIRED}
        heads = fields["num_attention_heads"]
        # The rest has the defaults that transformers gives an absent key.
        default_kv, default_length, default_window = (
            (heads, 2048, None) if model_type == "llama" else (8, 131072, 4096)
        )
        theta, scaling = _rope_from_hf(hf, default_length)
        eos = hf.pop("eos_token_id", 2)
        config = cls(
            **fields,
            model_type=model_type,
            num_key_value_heads=hf.pop("num_key_value_heads", default_kv) or heads,
            head_dim=hf.pop("head_dim", None) or fields["hidden_size"] // heads,
            rms_norm_eps=float(hf.pop("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=hf.pop("max_position_embeddings", default_length),
            sliding_window=hf.pop("sliding_window", default_window),
            tie_word_embeddings=hf.pop("tie_word_embeddings", False),
            bos_token_id=hf.pop("bos_token_id", 1),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=hf.pop("pad_token_id", None),
        )
        for key, value in hf.items():
            if key in _FIXED and value not in _FIXED[key]:
                raise UserError(
                    f"config.json sets {key}={value!r:.100}, which is not supported: expected "
                    f"{_FIXED[key][0]!r}"
                )
            if key not in _FIXED and key not in _METADATA:
                raise UserError(
                    f"config.json sets {key:.100}={value!r:.100}, which this model does not know; "
                    "remove the key if it does not change what the model computes"
                )
        return config

    def to_hf(self) -> dict:
        """The content of a `config.json` that transformers 4 and 5 both read."""
        hf = dataclasses.asdict(self)
        hf["architectures"] = [_ARCHITECTURE[self.model_type]]
        hf["hidden_act"] = "silu"
        if self.rope_scaling and self.rope_scaling.rope_type == "linear":
            hf["rope_scaling"] = {"rope_type": "linear", "factor": self.rope_scaling.factor}
        if self.model_type == "llama":
            hf.pop("sliding_window")
        if isinstance(self.eos_token_id, tuple):
            hf["eos_token_id"] = list(self.eos_token_id)
        return hf


_ARCHITECTURE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_MOST_LAYERS = 10_000  # each costs memory before any tensor is looked at


def _or_null(kind):
    words, holds = kind
    return f"{words} or null", lambda value: value is None or holds(value)


_SIZE = "a whole number above 0", lambda value: type(value) is int and 0 < value < 2**31
_NUMBER = "a number above 0", lambda value: type(value) in (int, float) and 0 < value < 1e30
_TOKEN = "a token's number", lambda value: type(value) is int and abs(value) < 2**31
_NAME = "a name", lambda value: isinstance(value, str)
_OBJECT = "an object", lambda value: isinstance(value, dict)
_LAYERS = f"1 to {_MOST_LAYERS} layers", lambda value: type(value) is int and 0 < value <= _MOST_LAYERS
_TOKENS = (
    "a token's number or a list of them",
    lambda value: all(map(_TOKEN[1], value if isinstance(value, list) else [value])),
)
# What a setting's value has to be, in words, and whether it is.
_KINDS = {
    key: kind
    for kind, keys in (
        (_SIZE, ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                 "max_position_embeddings", "original_max_position_embeddings")),
        (_or_null(_SIZE), ("num_key_value_heads", "head_dim", "sliding_window")),
        (_LAYERS, ("num_hidden_layers",)),
        (_NUMBER, ("rms_norm_eps", "factor", "low_freq_factor", "high_freq_factor")),
        (_or_null(_NUMBER), ("rope_theta",)),
        (("true or false", lambda value: type(value) is bool), ("tie_word_embeddings",)),
        (_or_null(_TOKEN), ("bos_token_id", "pad_token_id")),
        (_or_null(_TOKENS), ("eos_token_id",)),
        (_or_null(_NAME), ("model_type", "rope_type", "type")),
        (_or_null(_OBJECT), ("rope_parameters", "rope_scaling")),
    )
    for key in keys
}  # fmt: skip
# Settings with the values, first the usual one, at which they are what this model computes.
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "tie_encoder_decoder": (False,),
    "auto_map": (None,),
}
# Keys that describe the file or the training of the model and cannot change its forward pass.
_METADATA = {
    "_attn_implementation_autoset", "_name_or_path", "attn_implementation", "decoder_start_token_id",
    "dtype", "finetuning_task", "id2label", "initializer_range", "is_llama_config", "label2id",
    "max_sequence_length", "name_or_path", "output_attentions", "output_hidden_states", "prefix",
    "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
    "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


def _check_kinds(settings: dict):
    """Raises UserError for a value that is not of its key's kind."""
    for key, value in settings.items():
        expected, holds = _KINDS.get(key, ("", lambda value: True))
        if not holds(value):
            raise UserError(f"config.json sets {key}={value!r:.100}: expected {expected}")


def _rope_from_hf(hf: dict, max_length: int) -> tuple[float, RopeScaling | None]:
    """Takes theta and scaling out of `hf`: `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
    rope = dict(hf.pop("rope_parameters", None) or hf.pop("rope_scaling", None) or {})
    _check_kinds(rope)
    hf.pop("rope_scaling", None)
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    hf.pop("rope_theta", None)
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    fields = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }.get(rope_type)
    if fields is None:
        raise UserError(
            f"config.json asks for rope scaling {rope_type!r:.100}: expected default, linear or llama3"
        )
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings", max_length))
    rest = set(rope) - set(fields) - {"original_max_position_embeddings"}
    if rest or not set(fields) <= set(rope):
        raise UserError(
            f"config.json's rope scaling {rope_type!r} has {sorted(rope)!r:.300}: expected {sorted(fields)}"
        )
    return theta, RopeScaling(
        rope_type, **{key: rope[key] for key in fields}
    ) if rope_type != "default" else None
