"""Tokenizers of Hugging Face folders: read, saved, and a fingerprint."""

import hashlib
import json
import os
from pathlib import Path

from prom_jax.tokenization import PreTrainedTokenizerFast, sentencepiece
from prom_jax.tokenization.checks import load_checked
from prom_jax.utils.errors import UserError


def load(path, source=None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, which adds BOS and EOS exactly where the model's own does.

    Args:
      path: the folder.
      source: what its user calls it, for messages; None for `path`.
    Returns:
      The tokenizer.
    Raises:
      UserError: if there is no tokenizer, it is of a kind that is not supported, or it has no EOS token.
    """
    return load_checked(_from_directory, Path(path), source or path)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits that change with what the tokenizer makes of a text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding"), state.pop("truncation")  # set by calls, not part of the vocabulary
    parts = [state, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save(tokenizer: PreTrainedTokenizerFast, directory, chat_template: str | None):
    """Writes the tokenizer's files into `directory`, with `chat_template` (jinja) in place of its own.

    The folder loads with AutoTokenizer of transformers 4 and 5.
    """
    own, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        tokenizer.save_pretrained(directory)
    finally:
        tokenizer.chat_template = own
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 fails on what version 5 writes here: its name for the class that reads tokenizer.json as
    # it stands, and a list under this key.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if extra := config.pop("extra_special_tokens", None):
        config["additional_special_tokens"] = extra
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_names_no_files(path / name)
    if (path / "tokenizer.json").exists():
        from transformers import AutoTokenizer  # which imports torch where there is one: seconds

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if (path / "tokenizer.model").exists():
        return sentencepiece.read(path)
    raise UserError(
        f"{path} has no tokenizer: expected a tokenizer.json or a SentencePiece tokenizer.model in it"
    )


def _check_names_no_files(path: Path):
    """transformers takes files that these settings name, wherever they are, before those of the folder."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, value in settings.items():
        named = isinstance(value, str) and not key.endswith("_token") and os.path.isfile(value)
        if named or (key in ("fast_tokenizer_files", "init_inputs") and value):
            raise UserError(
                f"{path} sets {key}={value!r:.100}, another file: expected the tokenizer's files in its "
                "folder; do not use this folder unless you know who made it, or remove the key"
            )
