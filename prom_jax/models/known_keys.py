"""The keys of a `config.json` that are known: what their values may be, and which change nothing that is
computed."""

from prom_jax.models.config import MAX_LAYERS
from prom_jax.utils.errors import UserError

# What a key's value has to be, in words, and whether it is.


def _is_size(value) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_whole(value) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_number(value) -> bool:
    """Whether it is a number above 0 that float32 can hold."""
    return type(value) in (int, float) and 0 < value < 1e30


def _is_token(value) -> bool:
    return type(value) is int and abs(value) < 2**31


def _is_token_or_list(value) -> bool:
    return all(map(_is_token, value if isinstance(value, list) else [value]))


def _is_layer_number(value) -> bool:
    return type(value) is int and 0 < value <= MAX_LAYERS


def _is_bool(value) -> bool:
    return type(value) is bool


def _is_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_name(value) -> bool:
    return isinstance(value, str)


def is_numbers(value) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_object(value) -> bool:
    return isinstance(value, dict)


_KINDS = (
    ("a whole number above 0", _is_size, ("vocab_size", "hidden_size", "intermediate_size",
     "num_attention_heads", "max_position_embeddings", "sliding_window_pattern")),
    ("a whole number above 0 or null", _is_size, ("num_key_value_heads", "head_dim", "sliding_window",
     "original_max_position_embeddings")),
    ("a whole number", _is_whole, ("max_window_layers",)),
    (f"1 to {MAX_LAYERS} layers", _is_layer_number, ("num_hidden_layers",)),
    ("a number above 0", is_number, ("rms_norm_eps", "low_freq_factor", "high_freq_factor")),
    ("a number above 0 or null", is_number, ("factor",)),
    ("a number above 0 or null", is_number, ("rope_theta", "rope_local_base_freq",
     "partial_rotary_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")),
    ("a list of numbers above 0", is_numbers, ("short_factor", "long_factor")),
    ("true or false", _is_bool, ("tie_word_embeddings", "truncate")),
    ("true, false or null", _is_bool, ("attention_bias", "mlp_bias", "use_sliding_window")),
    ("a token's number or null", _is_token, ("bos_token_id", "pad_token_id")),
    ("a token's number or a list of them, or null", _is_token_or_list, ("eos_token_id",)),
    ("a name or null", _is_name, ("model_type", "rope_type", "type")),
    ("an object or null", _is_object, ("rope_parameters", "rope_scaling")),
    ("an object", _is_object, ("text_config",)),
    ("a list of names or null", _is_names, ("layer_types",)),
)  # fmt: skip
_KIND_OF = {key: (words, holds) for words, holds, keys in _KINDS for key in keys}
# Keys with the values, first the usual one, at which they are what these models compute.
FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None, {}),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "tie_encoder_decoder": (False,),
    "auto_map": (None,),
    "use_bidirectional_attention": (False, None),
    "rope_condense_ratio": (1, 1.0, None),
    "use_mrope": (False, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "lm_head_bias": (False, None),
}
# Keys that describe the file or the training of the model and cannot change its forward pass.
METADATA = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attn_implementation",
    "decoder_start_token_id", "dtype", "finetuning_task", "id2label", "initializer_range", "internal_version",
    "is_llama_config", "label2id", "max_sequence_length", "name_or_path", "original_max_position_embeddings",
    "output_attentions", "output_hidden_states", "prefix", "pretraining_tp", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip
# Keys that ask for something, but not of the forward pass: of generation, a trainer, a program's kernels.
WITHOUT_EFFECT = {
    "_flash_attn_2_enabled", "_model_name_or_path", "_sliding_window_pattern", "bad_words_ids",
    "begin_suppress_tokens", "bf16", "cache_implementation", "diversity_penalty", "do_sample",
    "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "flash_attn", "forced_bos_token_id", "forced_eos_token_id", "fp16", "gradient_checkpointing",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "model_max_length",
    "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict_in_generate", "suppress_tokens", "temperature", "tf_legacy_loss",
    "tokenizer_model_max_length", "top_k", "top_p", "typical_p", "use_bfloat16", "use_flash_attention",
    "use_flash_attn", "use_reentrant", "use_sdpa",
}  # fmt: skip


def check_kinds(settings: dict):
    """Raises UserError for a value that is not of its key's kind."""
    for key, value in settings.items():
        expected, holds = _KIND_OF.get(key, ("", None))
        if holds and not (holds(value) or (value is None and "null" in expected)):
            raise UserError(f"config.json sets {key}={value!r:.100}: expected {expected}")
