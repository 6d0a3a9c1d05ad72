"""Tokenizers: those that come with a Hugging Face model, and those written in a GGUF file's metadata."""

import hashlib
import json
import os
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from prom_jax.checkpoints.reader import local_path, open_gguf
from prom_jax.utils.errors import UserError

LONGEST = 1000  # characters of a token; the ways to halve it cost its square
# Kinds of token in `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(source) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, which adds BOS and EOS exactly where the model's own does.

    Args: source: a Hugging Face directory, a hub id or a `.gguf` file.
    Raises:
      UserError: if there is no tokenizer, it is of a kind that is not supported, or it has no EOS token.
    """
    path = local_path(source)
    try:
        tokenizer = from_gguf(path) if path.is_file() else _from_directory(path)
        if not tokenizer.is_fast or not tokenizer("a")["input_ids"]:
            raise ValueError("it makes nothing of a text")
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of as many kinds as there are libraries; Rust's panics are no Exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the tokenizer in {path} cannot be read ({reason:.200}): expected a valid tokenizer.json, "
            "SentencePiece tokenizer.model or GGUF file; fetch it again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {source} has no EOS token, which ends every response: "
            "set `eos_token` in its tokenizer_config.json"
        )
    return tokenizer


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
        return _from_sentencepiece(path)
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
                f"{path} sets {key}={value!r:.100}, another file: expected the tokenizer's files beside it; "
                "do not use this folder unless you know who made it, or remove the key"
            )


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """LLaMA's `tokenizer.model` where there is no tokenizer.json.

    Three things that transformers 5 does otherwise: AutoTokenizer leaves out the prefix space, every class
    leaves out BOS, and merges come in the order of ids, so that runs of spaces are cut unlike in training
    (their pieces have early ids and the lowest scores).
    """
    # As the protocol buffer that it is; the C++ library would know no more of it.
    pieces = sentencepiece_model_pb2.ModelProto.FromString((path / "tokenizer.model").read_bytes()).pieces
    if not pieces:
        raise ValueError("it has no pieces")
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    _check_lengths(vocab)
    config = path / "tokenizer_config.json"
    config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    tokenizer = LlamaTokenizer.from_pretrained(path, add_bos_token=config.get("add_bos_token", True))
    merges = _merges(vocab, [piece.score for piece in pieces])
    tokenizer.backend_tokenizer.model = models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True)
    return tokenizer


def from_gguf(path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata: byte-level BPE ('gpt2') or SentencePiece BPE ('llama').

    Raises:
      UserError: for another kind of tokenizer, or a pre-tokenizer that is not known here.
    """
    metadata = open_gguf(path).metadata
    get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(get("model"))
    if build is None or get("tokens") is None:
        raise UserError(
            f"{path} holds a tokenizer of kind {get('model')!r:.100}: expected 'gpt2' (byte-level BPE) or "
            "'llama' (SentencePiece BPE)"
        )
    tokens, kinds = get("tokens"), get("token_type", [])
    _check_lengths(tokens)
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
    split_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"), bytes_only]
    words = {
        "default": [split_words],
        "gpt-2": [split_words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), split_words],
        "llama-bpe": llama3,
        "llama-v3": llama3,
        "llama3": llama3,
    }
    pre = get("pre")
    if pre not in words:
        raise UserError(
            f"{path} splits text by tokenizer.ggml.pre={pre!r:.100}: expected one of {', '.join(words)}; "
            "use the model's Hugging Face directory instead"
        )
    is_llama3 = words[pre] is llama3
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=is_llama3,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(words[pre])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **_special_tokens(tokens, get, add_bos=is_llama3)
    )


def _sentencepiece(path, tokens: list[str], get) -> PreTrainedTokenizerFast:
    """LLaMA's scheme: spaces as '▁', bytes for what the vocabulary lacks."""
    if get("remove_extra_whitespaces", False):
        raise UserError(
            f"{path} has a tokenizer that removes extra white space, which is not supported; "
            "use the model's Hugging Face directory instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    return LlamaTokenizer(
        vocab=vocab,
        merges=_merges(vocab, get("scores")),
        add_prefix_space=get("add_space_prefix", True),
        **_special_tokens(tokens, get, add_bos=True),
    )


def _check_lengths(tokens):
    if (longest := max(map(len, tokens), default=0)) > LONGEST:
        raise ValueError(f"it has a token of {longest} characters, at most {LONGEST} are expected")


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges behind SentencePiece's scores: each way to halve a piece, by falling score of the piece.

    Of equal score, the longer left half first.
    """
    halves = (
        (-scores[i], -cut, cut - len(token), i, token)
        for token, i in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    return [(token[:-minus], token[-minus:]) for _, minus, _, _, token in sorted(halves)]
