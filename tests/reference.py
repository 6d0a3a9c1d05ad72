"""What the tests of the numerical core share: random transformers models, their weights in ours, and rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from prom_jax.checkpoints.params import hf_tensors
from prom_jax.models import decoder
from prom_jax.models.auto import config_from_hf
from prom_jax.models.blocks import Compute
from prom_jax.parallel.sharding import param_sharding
from prom_jax.training.step import make_update, split_params

torch.set_num_threads(1)  # faster on work this small

SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
# Of each shape the family's class names, and settings.
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    # Heads wider than hidden_size / num_attention_heads; at 600 tokens the original 64 are long past.
    "llama3": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama with biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "linear": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "smollm2": (
        "Llama",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_theta": 1e5,
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 4, "sliding_window": 128, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    # Windows in the upper layers: two kinds of layers.
    "qwen2 with windows": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 100,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6}),
    "qwen3 with biases": ("Qwen3", {"num_key_value_heads": 8, "head_dim": 8, "attention_bias": True}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4, "rope_theta": 5e5}),
    # Caps as small as scores and logits are here, so that they matter.
    "gemma2": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 100,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 1.0,
        },
    ),
    # The last layer of two has no window, and a base and a scaling of its own.
    "gemma3": (
        "Gemma3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 100,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    # All four layers have a window.
    "gemma3 with a cap": (
        "Gemma3",
        {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 100, "final_logit_softcapping": 1.0},
    ),
    # Frequencies on either side of those that turn between 32 times and once in 256 tokens.
    "yarn": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "dynamic": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral nemo": ("Mistral", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None}),
    "phi3": (
        "Phi3",
        {"num_key_value_heads": 2, "sliding_window": 100, "partial_rotary_factor": 0.75, "hidden_size": 128},
    ),
    # Within the original context; the long factors are for beyond it.
    "phi3 longrope": (
        "Phi3",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 9.0, 30.0],
            },
        },
    ),
    "glm4": ("Glm4", {"num_key_value_heads": 2, "head_dim": 16}),
    "olmo3": (
        "Olmo3",
        {
            "num_key_value_heads": 4,
            "sliding_window": 100,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "original_max_position_embeddings": 128,
                    "attention_factor": 1.2,
                },
            },
        },
    ),
    "smollm3": ("SmolLM3", {"num_key_value_heads": 2, "no_rope_layer_interval": 2}),
    "granite": (
        "Granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "logits_scaling": 6.0,
        },
    ),
}


def short_window(family):
    """Settings by which a family that has a window has one that is shorter than the texts of most tests."""
    return {"sliding_window": 6} if "sliding_window" in FAMILIES[family][1] else {}


def config_class(name):
    """The class of a family's configuration, of text where there is another one for more."""
    return getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")


def hf_model(family, **settings):
    """A random model of transformers in float32, in which attention, positions, norms and biases matter."""
    torch.manual_seed(0)
    name, shape = FAMILIES[family]
    config = config_class(name)(**{**SIZES, **shape, **settings})
    return randomized(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def randomized(model):
    """A model of transformers with weights by which attention, positions, norms and biases matter."""
    offset = 1.0 if type(model).__name__.startswith(("Gemma2", "Gemma3")) else 0.0  # they add 1 themselves
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(-0.5, 0.5)
        elif parameter.ndim == 1:
            parameter.data.uniform_(0.5 - offset, 1.5 - offset)
        elif "embed_tokens" in name:
            parameter.data.normal_(std=0.02)  # as small as in real models: the norm's epsilon shows
        else:
            gain = 2 if "q_proj" in name or "k_proj" in name else 1
            parameter.data.normal_(std=gain * parameter.shape[1] ** -0.5)
    return model


def hf_logits(hf, hidden, head):
    """What transformers makes of a head's input."""
    logits = head(hidden) / getattr(hf.config, "logits_scaling", 1.0)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def generate(hf, prompt, max_new_tokens, eos=None):
    """New tokens of transformers' greedy decoding, up to and without the first of `eos`."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        new = hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
    new = new[0, len(prompt) :].tolist()
    return new[:-1] if eos and new[-1] in eos else new


def to_params(tensors, config, exits=(), heads=(), lora=None):
    """Tensors by transformers' names (weights or their gradients) as our nested dict of numpy arrays; with
    adapters, of what there is of all."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    params = {head: arrays[head] for head in heads}
    stacked = {}
    for name, (*stack, ours), layer in hf_tensors(config, exits, lora):
        if lora and name not in arrays:
            continue
        into = params.setdefault(stack[0], {}) if stack else params
        if layer:
            stacked.setdefault((stack[0], ours), []).append(arrays[name])
        else:
            into[ours] = arrays[name]
    for (stack, ours), of_layers in stacked.items():
        params[stack][ours] = np.stack(of_layers)
    return params


def hf_parameters(hf):
    """A model's parameters by transformers' names, those of peft's adapters as peft saves them."""
    return {hf_name(name): parameter for name, parameter in hf.named_parameters()}


def hf_name(name):
    """The name of a parameter without what peft puts between."""
    if ".lora_" in name:
        return "base_model.model." + name.replace(".default", "")
    return name.replace(".base_layer", "")


def to_model(
    hf, pivot_layer=0, pivot_head=None, config=None, more_exits=(), lora=None, low_rank=None, **compute
):
    """Our model with the weights of transformers' `hf`; `config` in place of the one that they come with;
    with `lora` the adapters that peft put into `hf`, and the tensors `low_rank` of heads."""
    tensors, config = hf_parameters(hf) | (low_rank or {}), config or config_from_hf(hf.config.to_dict())
    exits = sorted({pivot_layer, *more_exits} - {0})
    heads = {} if pivot_head is None else {"pivot_head": pivot_layer}
    if heads:
        tensors["pivot_head"] = pivot_head
    whole, heads = heads, heads | dict.fromkeys(lora.heads if lora else (), pivot_layer)
    model = decoder.abstract(config, compute=Compute(**compute), exits=exits, heads=heads, lora=lora)
    params = to_params(tensors, config, exits, whole, lora)
    return decoder.with_params(model, jax.tree.map(jnp.asarray, params))


def place_params(mesh, params, config, lora=None):
    """Parameters in their shards on a mesh."""
    axes = decoder.param_axes(config, ["pivot_head"], lora)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, param_sharding(mesh, axes[path[-1].key], x.shape)), params
    )


def random_examples(seed, lengths, vocabulary=SIZES["vocab_size"]):
    """(tokens, weights) of each length; the weight of a place, 1 or 0, is that of its next token."""
    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        weights = (random.random(length) < 0.6).astype(np.float32)
        weights[: length // 4], weights[-1] = 0, 0
        examples.append((random.integers(0, vocabulary, length), weights))
    return examples


def pack(examples, layout, length):
    """A batch's rows: `layout` has, for each row, the indices of its examples."""
    rows = {name: np.zeros((len(layout), length), np.int32) for name in ("tokens", "positions", "segments")}
    rows |= {"labels": np.zeros((len(layout), length), np.int32)}
    rows |= {"weights": np.zeros((len(layout), length), np.float32)}
    for row, indices in enumerate(layout):
        start = 0
        for segment, index in enumerate(indices, 1):
            tokens, weights = examples[index]
            at = (row, slice(start, start + len(tokens)))
            rows["tokens"][at], rows["weights"][at] = tokens, weights
            rows["labels"][at] = np.append(tokens[1:], 0)
            rows["positions"][at], rows["segments"][at] = np.arange(len(tokens)), segment
            start += len(tokens)
    return jax.tree.map(jnp.asarray, rows)


@functools.partial(jax.jit, static_argnames=("method", "accumulation", "appended", "chunk"))
def gradients(model, method, batch, accumulation=1, appended=None, chunk=16):
    """The losses and weights of an update, and the gradients that its optimizer is given."""
    keep = optax.GradientTransformation(
        lambda params: None, lambda updates, state, params: (updates, updates)
    )
    chunks = dict.fromkeys(method.streams, chunk)
    update = make_update(model, method, keep, accumulation, appended, chunks)
    trained, frozen = split_params(decoder.to_params(model), model, method)
    _, kept, metrics = update(trained, None, batch, frozen)
    return {key: value for key, value in metrics.items() if key.startswith(("loss", "weight"))}, kept


def relative_error(ours, theirs):
    """The largest difference over the largest value of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def relative_errors(ours, theirs):
    """`relative_error` of each tensor of two parameter trees, each layer's apart: {'lower.q_proj.0': …}."""
    errors = {}
    for name, value in theirs.items():
        if isinstance(value, dict):
            for kind, stacked in value.items():
                assert len(ours[name][kind]) == len(stacked)
                for layer, pair in enumerate(zip(ours[name][kind], stacked)):
                    errors[f"{name}.{kind}.{layer}"] = relative_error(*pair)
        else:
            errors[name] = relative_error(ours[name], value)
    return errors
