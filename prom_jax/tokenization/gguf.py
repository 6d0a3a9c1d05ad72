"""Tokenizers written in a GGUF file's metadata."""

import functools
import math
from collections.abc import Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer

from prom_jax.tokenization import PreTrainedTokenizerFast
from prom_jax.tokenization.checks import check_lengths, load_checked
from prom_jax.tokenization.sentencepiece import ranked_merges
from prom_jax.utils.errors import UserError

# Kinds of token in `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# How text is cut into words before merging: GPT-4's expression, with digits in threes or alone.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3")  # a word of the vocabulary is a token whatever the merges


def load(metadata: Mapping, path, source=None) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata: byte-level BPE ('gpt2') or SentencePiece BPE ('llama').

    Args:
      metadata: the file's key-value pairs.
      path: the file, for messages.
      source: what its user calls it, for messages; None for `path`.
    Returns:
      The tokenizer.
    Raises:
      UserError: for another kind of tokenizer, a pre-tokenizer that is not known here, or one without EOS
        token.
    """
    return load_checked(functools.partial(_build, metadata), path, source or path)


def _build(metadata: Mapping, path) -> PreTrainedTokenizerFast:
    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(get("model"))
    if build is None or get("tokens") is None:
        raise UserError(
            f"{path} holds a tokenizer of kind {get('model')!r:.100}: expected 'gpt2' (byte-level BPE) or "
            "'llama' (SentencePiece BPE)"
        )
    tokens, kinds = get("tokens"), get("token_type", [])
    check_lengths(tokens)
    if build is _sentencepiece:
        tokens = _with_marked_spaces(tokens, kinds)
    tokenizer = build(path, tokens, get)
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        tokenizer.chat_template = template
    return tokenizer


def _special_tokens(tokens: list[str], get, add_bos: bool) -> dict:
    """Keywords of a tokenizer class: the special tokens and whether they are put around a text."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: get(key) for name, key in keys.items()}
    for name, i in ids.items():
        if i is not None and i not in range(len(tokens)):
            raise ValueError(f"{name} is token {i!r:.100} of {len(tokens)}")
    return {
        **{name: None if i is None else tokens[i] for name, i in ids.items()},
        "add_bos_token": get("add_bos_token", add_bos),
        "add_eos_token": get("add_eos_token", False),
        "clean_up_tokenization_spaces": False,
    }


def _byte_level(path, tokens: list[str], get) -> PreTrainedTokenizerFast:
    """GPT-2's scheme; `tokenizer.ggml.pre` says how text is cut into words before merging."""
    pre = get("pre")
    splits = _splits()
    if pre not in splits:
        raise UserError(
            f"{path} splits text by tokenizer.ggml.pre={pre!r:.100}: expected one of {', '.join(splits)}; "
            "use the model's Hugging Face directory instead"
        )
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_special_tokens(tokens, get, add_bos=pre in _WHOLE_WORDS)
    )


def _splits() -> dict[str, list]:
    """The steps that cut text into words, by the name of the whole in GGUF."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def gpt4(digits):
        return [pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"), bytes_only]

    return {
        **{name: [gpt2] for name in ("default", "gpt-2")},
        **{name: [pre_tokenizers.Digits(individual_digits=True), gpt2] for name in ("smollm", "refact")},
        **dict.fromkeys((*_WHOLE_WORDS, "dbrx"), gpt4("{1,3}")),
        "qwen2": gpt4(""),
    }


def _with_marked_spaces(tokens: list[str], kinds: list[int]) -> list[str]:
    """SentencePiece's own spelling of runs of spaces that are user-defined, which the makers of GGUF files
    write as they look in a text."""
    user_defined = {i for i, kind in enumerate(kinds) if kind == _USER_DEFINED}
    return [
        token.replace(" ", "▁") if i in user_defined and not token.strip(" ") else token
        for i, token in enumerate(tokens)
    ]


def _sentencepiece(path, tokens: list[str], get) -> PreTrainedTokenizerFast:
    """LLaMA's scheme: spaces as '▁', bytes for what the vocabulary lacks."""
    if get("remove_extra_whitespaces", False):
        raise UserError(
            f"{path} has a tokenizer that removes extra white space, which is not supported; "
            "use the model's Hugging Face directory instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece takes user-defined pieces, such as Gemma's runs of spaces, before all others. Their scores
    # in GGUF mean nothing.
    first = {i for i, kind in enumerate(get("token_type", [])) if kind == _USER_DEFINED}
    scores = [math.inf if i in first else score for i, score in enumerate(get("scores"))]
    return LlamaTokenizer(
        vocab=vocab,
        merges=ranked_merges(vocab, scores),
        add_prefix_space=get("add_space_prefix", True),
        **_special_tokens(tokens, get, add_bos=True),
    )
