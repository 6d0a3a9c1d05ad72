"""How a model's answers end and are sampled, from all that says so: `generation_config.json`, `config.json`,
a GGUF file and the tokenizer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prom_jax.models.config import DecoderConfig
from prom_jax.utils.errors import UserError

FILE = "generation_config.json"
# What a sampler here can do, with what each must be.
SAMPLING = {
    "temperature": ("a number of at least 0", lambda value: value >= 0),
    "top_k": ("a whole number of at least 0", lambda value: value >= 0 and value == int(value)),
    "top_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
}
# The names of the same and others in GGUF (`general.sampling.…`).
GGUF_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_GGUF_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def of_folder(folder: Path, config: Mapping) -> dict:
    """What a Hugging Face folder says of generation: its `generation_config.json`, or where it has none those
    keys of its `config.json`, as transformers does.

    Args:
      folder: of the files.
      config: the content of `config.json`.

    Returns:
      Keys of a `generation_config.json`.

    Raises:
      UserError: for a value that makes no sense.
    """
    path = folder / FILE
    if not path.exists():
        return check({key: config[key] for key in ("do_sample", *SAMPLING) if key in config}, "config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again, or remove it") from error
    return check(content, path)


def of_gguf(metadata: Mapping, path) -> dict:
    """What a GGUF file's metadata says of generation, as keys of a `generation_config.json`."""
    stops = [metadata.get(f"tokenizer.ggml.{name}") for name in _GGUF_STOPS]
    named = {key: metadata.get(f"general.sampling.{name}") for key, name in GGUF_SAMPLING.items()}
    # The shortest decimals of numbers that are held in float32.
    sampling = {
        key: value if isinstance(value, int) else float(f"{value:.6g}")
        for key, value in named.items()
        if value is not None
    }
    if sampling:
        sampling["do_sample"] = sampling.get("temperature") != 0
    return check({"eos_token_id": _unique(stops), **sampling}, path)


def check(content: dict, source) -> dict:
    """The keys of a `generation_config.json`.

    Raises:
      UserError: for a value that makes no sense, which names the source.
    """
    for key, (expected, holds) in SAMPLING.items():
        value: Any = content.get(key)
        number = type(value) in (int, float) and abs(value) < 2**63  # JSON may have NaN and infinity too
        if value is not None and not (number and holds(value)):
            raise UserError(f"{source} sets {key}={value!r:.100}: expected {expected}; remove the key")
    for token in _listed(content.get("eos_token_id")):
        if type(token) is not int:
            raise UserError(
                f"{source} sets eos_token_id={content['eos_token_id']!r:.100}: expected a token's number or "
                "a list of them; remove the key"
            )
    return content


def stop_tokens(config: DecoderConfig, tokenizer) -> tuple[int, ...]:
    """All tokens that end an answer: the tokenizer's EOS first, then those of `config.json`, of
    `generation_config.json`, and a GGUF file's ends of turns and messages. Numbers that are no token of the
    model, such as -1 for none, are left out."""
    of_config, of_generation = config.eos_token_id, config.generation.get("eos_token_id")
    named = _unique([tokenizer.eos_token_id, *_listed(of_config), *_listed(of_generation)])
    return tuple(token for token in named if 0 <= token < config.vocab_size)


def with_stops(config: DecoderConfig, tokens: tuple[int, ...]) -> DecoderConfig:
    """The configuration of a model that ends answers with these tokens too."""
    known = _listed(config.generation.get("eos_token_id"))
    return dataclasses.replace(
        config, generation=config.generation | {"eos_token_id": _unique([*known, *tokens])}
    )


def sampling(config: DecoderConfig) -> dict[str, float]:
    """The settings of sampling that a model comes with; {} where it asks for greedy decoding, or nothing."""
    if not config.generation.get("do_sample"):
        return {}
    given = {key: config.generation.get(key) for key in SAMPLING}
    return {"temperature": 1.0} | {key: value for key, value in given.items() if value is not None}


def keys(config: DecoderConfig, tokenizer) -> dict:
    """The content of a `generation_config.json`: what the source had, and all stop tokens."""
    stops = stop_tokens(config, tokenizer)
    own = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
    }
    # A mark of transformers, by which it would make its own out of the config.
    kept = {key: value for key, value in config.generation.items() if key != "_from_model_config"}
    return kept | {key: value for key, value in own.items() if value is not None}


def _listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value is not None else []


def _unique(values: list) -> list:
    return list(dict.fromkeys(value for value in values if value is not None))
