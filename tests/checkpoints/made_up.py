"""Small models of transformers with a tokenizer, folders of them, and GGUF files, written with the package of
the format."""

import gguf
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prom_jax.checkpoints.params import ParamsReader
from prom_jax.checkpoints.safetensors import save_hf
from prom_jax.models import decoder
from tests import reference

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


CARD = {"base_model": "owner/base", "language": "sw", "method": "prom", "learning_rate": 2e-5}
PIVOT = {"pivot_head": 3}  # and the block after which it reads
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")),
    bos_token="<s>",
    eos_token="</s>",
)


def hf_model(dtype=torch.float32, family="llama2", **settings):
    """A small model of transformers, a Llama if no other family is named."""
    return reference.hf_model(family, **{**SIZES, **settings}).to(dtype)


def save(params, reader, directory, heads=None, **options):
    """Writes parameters as a folder, with further heads as in `Decoder`."""
    options = {"dtype": reader.dtype, "chat_template": "ours", "card": CARD, **options}
    model = decoder.with_params(decoder.abstract(reader.config, heads=heads or {}), params)
    save_hf(ParamsReader(model), TOKENIZER, directory, **options)


def tensors(directory):
    """All tensors of a folder, by transformers' names, as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= {k: (v.dtype, v.shape, v.tobytes()) for k, v in load_file(path).items()}
    return found


def write_gguf(path, settings, arrays, architecture="llama"):
    """`arrays`: name -> array, or (type name, its blocks [rows, bytes])."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        of_any = key.startswith(("tokenizer.", "split.", "general."))
        add(key if of_any else f"{architecture}.{key}", value)
    for name, array in arrays.items():
        if isinstance(array, tuple):
            kind, data = array
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # in GGUF where it is not the model_type
KEYS = {  # in GGUF, by transformers' names
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": gguf.Keys.Attention.LAYERNORM_RMS_EPS,
    "sliding_window": gguf.Keys.Attention.SLIDING_WINDOW,
    "_sliding_window_pattern": gguf.Keys.Attention.SLIDING_WINDOW_PATTERN,
    "attn_logit_softcapping": gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING,
    "final_logit_softcapping": gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
    "embedding_multiplier": gguf.Keys.LLM.EMBEDDING_SCALE,
    "residual_multiplier": gguf.Keys.LLM.RESIDUAL_SCALE,
    "logits_scaling": gguf.Keys.LLM.LOGIT_SCALE,
    "attention_multiplier": gguf.Keys.Attention.SCALE,
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def gguf_settings(config, **settings):
    """Of a transformers config what a GGUF file says; settings that are None are left out."""
    held = {theirs.removeprefix("{arch}."): getattr(config, ours, None) for ours, theirs in KEYS.items()}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    held["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        held |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        held["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    held["attention.key_length"] = head_dim_of(config)
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1:
        held["rope.dimension_count"] = int(share * head_dim_of(config))
    return {key: value for key, value in {**held, **settings}.items() if value is not None}


def head_dim_of(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_name(hf_name, architecture, layers):
    """A tensor's name, as the package of the format has it."""
    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    module, _, parameter = hf_name.rpartition(".")
    return f"{gguf.get_tensor_name_map(kind, layers).get_name(module)}.{parameter}"


def interleave(rows, head_dim):
    """Rows of q or k as GGUF has them: of each head 0, d/2, 1, d/2 + 1, …"""
    order = [
        head + half * head_dim // 2 + i
        for head in range(0, len(rows), head_dim)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


def to_gguf(model, path, kind=None, **settings):
    """Writes a transformers model as GGUF; matrices in the type `kind`."""
    config, arrays = model.config, {}
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    for name, value in model.named_parameters():
        value = value.detach().float().numpy()
        if "norm" in name and architecture in ("gemma2", "gemma3"):
            value = 1 + value
        if architecture in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
            value = interleave(value, head_dim_of(config))
        if kind and value.ndim > 1:
            value = (kind, gguf.quantize(value, gguf.GGMLQuantizationType[kind]))
        arrays[gguf_name(name, architecture, config.num_hidden_layers)] = value
    return write_gguf(path, gguf_settings(config, **settings), arrays, architecture)
