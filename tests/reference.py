"""What the tests of the numerical core share: random transformers models, their weights in ours, and rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from prom_jax.models import decoder as llama
from prom_jax.parallel.sharding import param_sharding, path_keys
from prom_jax.training.step import make_update

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
    "attn_implementation": "eager",
}
FAMILIES = {
    "llama2": {"num_key_value_heads": 8},
    # Heads wider than hidden_size / num_attention_heads; at 600 tokens the original 64 are long past.
    "llama3": {
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
    "linear": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "mistral": {"num_key_value_heads": 4, "sliding_window": 128, "rope_theta": 1e6},
    "smollm2": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 1e5,
    },
}


def hf_model(family, **settings):
    """A random model of transformers in float32, in which attention, positions and norms all matter."""
    torch.manual_seed(0)
    name = "Mistral" if family == "mistral" else "Llama"
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[family], **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            parameter.data.normal_(std=0.02)  # as small as in real models: the norm's epsilon shows
        else:
            gain = 2 if "q_proj" in name or "k_proj" in name else 1
            parameter.data.normal_(std=gain * parameter.shape[1] ** -0.5)
    return model


def to_params(tensors, pivot_layer=0):
    """Tensors by transformers' names (weights or their gradients) as our nested dict of numpy arrays."""
    arrays = {name.removesuffix(".weight"): tensor.detach().numpy() for name, tensor in tensors.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in arrays if name.startswith("model.layers."))

    def stack(first, last):
        names = [name.removeprefix("model.layers.0.") for name in arrays if "layers.0." in name]
        each = lambda name: [arrays[f"model.layers.{layer}.{name}"] for layer in range(first, last)]
        return {name.split(".")[-1]: np.stack(each(name)) for name in names}

    params = {"embed_tokens": arrays["model.embed_tokens"], "norm": arrays["model.norm"]}
    params |= {name: arrays[name] for name in ("lm_head", "pivot_head") if name in arrays}
    params["lower"] = stack(0, pivot_layer or layers)
    if pivot_layer:
        params["upper"] = stack(pivot_layer, layers)
    return params


def to_model(hf, pivot_layer=0, pivot_head=None, config=None, **compute):
    """Our model with the weights of transformers' `hf`; `config` in place of the one that they come with."""
    tensors = dict(hf.named_parameters())
    if pivot_head is not None:
        tensors["pivot_head"] = pivot_head
    model = llama.abstract(
        config or llama.LlamaConfig.from_hf(hf.config.to_dict()),
        compute=llama.Compute(**compute),
        pivot_layer=pivot_layer,
        pivot_head=pivot_head is not None,
    )
    return llama.with_params(model, jax.tree.map(jnp.asarray, to_params(tensors, pivot_layer)))


def place_params(mesh, params):
    """Parameters in their shards on a mesh."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, param_sharding(mesh, path_keys(path), x.shape)), params
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


@functools.partial(jax.jit, static_argnames=("objective", "accumulation"))
def gradients(model, objective, batch, accumulation=1):
    """The losses and weights of an update, and the gradients that its optimizer is given."""
    keep = optax.GradientTransformation(
        lambda params: None, lambda updates, state, params: (updates, updates)
    )
    _, kept, metrics = make_update(model, objective, keep, accumulation)(llama.to_params(model), None, batch)
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
