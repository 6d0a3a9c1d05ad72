"""Tokenizers of Hugging Face folders: read, saved, and a fingerprint."""

import hashlib
import json
import os
from pathlib import Path

from prom_jax.tokenization import sentencepiece
from prom_jax.tokenization.base import PreTrainedTokenizerFast
from prom_jax.tokenization.checks import load_checked
from prom_jax.utils.console import console
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
    with sentencepiece.serializable(tokenizer) as by_library:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding"), state.pop("truncation")  # set by calls, not part of the vocabulary
    parts = [state, tokenizer.bos_token_id, tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(tokenizer.model_file if by_library else b"")
    return digest.hexdigest()[:16]


def save(
    tokenizer: PreTrainedTokenizerFast, directory, chat_template: str | None, max_length: int | None = None
):
    """Writes the tokenizer's files.

    Args:
      tokenizer: to save.
      directory: of the files.
      chat_template: jinja, in place of the tokenizer's own.
      max_length: tokens of the model's context, where the tokenizer knows no smaller number.

    The folder loads with AutoTokenizer of transformers 4 and 5. Where only the sentencepiece library cuts
    text as the tokenizer does, there is no tokenizer.json: it could not say so. Then transformers 4 does with
    `use_fast=False`, and so does whatever reads the model's scores, such as llama.cpp.
    """
    own, tokenizer.chat_template = tokenizer.chat_template, chat_template
    try:
        with sentencepiece.serializable(tokenizer) as by_library:
            tokenizer.save_pretrained(directory)
    finally:
        tokenizer.chat_template = own
    path = Path(directory) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 4 fails on what version 5 writes here: its name for the class that reads tokenizer.json as
    # it stands, and a list under this key.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if model := sentencepiece.model_of(tokenizer):  # llama.cpp's converter knows scores by it alone
        own = getattr(tokenizer, "model_file", None)
        path.with_name(sentencepiece.FILE).write_bytes(own or model.SerializeToString())
    if by_library:
        path.with_name("tokenizer.json").unlink()
        added = tokenizer.added_tokens_decoder.items()
        config |= {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,  # a prefix space after special tokens too
            "add_bos_token": tokenizer.add_bos_token,
            "add_eos_token": tokenizer.add_eos_token,
            "added_tokens_decoder": {str(i): token.__getstate__() for i, token in added},
        }
    if max_length:
        config["model_max_length"] = min(max_length, tokenizer.model_max_length)
    if chat_template:  # of its file the first versions of transformers 4 know nothing
        config["chat_template"] = chat_template
    if extra := config.pop("extra_special_tokens", None):
        config["additional_special_tokens"] = extra
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return (path / "tokenizer.json").exists() or (path / sentencepiece.FILE).exists()


def _from_directory(path: Path) -> PreTrainedTokenizerFast:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_names_no_files(path / name)
    own, by_scores = path / "tokenizer.json", path / sentencepiece.FILE
    if not has_tokenizer(path):
        raise UserError(
            f"{path} has no tokenizer: expected a tokenizer.json or a SentencePiece {by_scores.name} in it"
        )
    if not own.exists():
        return sentencepiece.read(path)
    # As the file stands: the classes that `tokenizer_class` names put their own steps in place of the file's.
    if not by_scores.exists() or not sentencepiece.is_model(by_scores):
        return PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer = sentencepiece.SentencePieceTokenizer.from_pretrained(path)
    tokenizer.model_file = by_scores.read_bytes()
    if different := sentencepiece.differences(tokenizer):
        console.print(
            f"WARNING   {own} cuts texts otherwise than the {by_scores.name} beside it, {different[0]!r:.60} "
            f"among {len(different)}: the former is used; remove it if the model was trained with the other"
        )
    return tokenizer


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
