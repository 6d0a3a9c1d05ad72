"""Tokenizers written in a GGUF file's metadata."""

import functools
import json
from collections.abc import Mapping
from typing import NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from prom_jax.tokenization import sentencepiece
from prom_jax.tokenization.base import PreTrainedTokenizerFast
from prom_jax.tokenization.checks import check_lengths, load_checked
from prom_jax.utils.errors import UserError

Piece = ModelProto.SentencePiece  # its types are those of `tokenizer.ggml.token_type`
# How text is cut into words before merging: GPT-4's expression, with digits in threes or alone, and that of
# GPT-4o, which keeps marks with their letters and begins a word where small letters are followed by capitals.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


class _Pre(NamedTuple):
    """What a name of `tokenizer.ggml.pre` stands for.

    Attributes:
      expression: by which text is cut into words; None for GPT-2's.
      digits: whether each digit is cut off first.
      whole_words: whether a word of the vocabulary is a token whatever the merges.
      bos: whether a text begins with BOS, where the file does not say it.
      nfc: whether text is normalised.
    """

    expression: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False

    def normalizer(self):
        """What is done to a text before; None for nothing."""
        return normalizers.NFC() if self.nfc else None

    def steps(self) -> list:
        """The pre-tokenizers that cut text into words."""
        first = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.expression:
            first.append(pre_tokenizers.Split(Regex(self.expression), behavior="isolated"))
        return [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.expression is None)]


PRE = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "olmo"), _Pre()),
    **dict.fromkeys(("smollm", "refact"), _Pre(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3"),
                    _Pre(_GPT4 % "{1,3}", whole_words=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _Pre(_GPT4 % "{1,3}")),
    "glm4": _Pre(_GPT4 % "{1,3}", whole_words=True),
    "qwen2": _Pre(_GPT4 % "", nfc=True),
    "tekken": _Pre(_GPT4O % ("", "", ""), whole_words=True, bos=True),
    "gpt-4o": _Pre(_GPT4O % (_CONTRACTIONS, _CONTRACTIONS, "{1,3}")),
}  # fmt: skip


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
    if build is _byte_level:
        added = [
            AddedToken(token, special=kind != Piece.USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (Piece.UNKNOWN, Piece.CONTROL, Piece.USER_DEFINED)
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
    pre = PRE.get(get("pre"))
    if pre is None:
        raise UserError(
            f"{path} splits text by tokenizer.ggml.pre={get('pre')!r:.100}: expected one of "
            f"{', '.join(PRE)}; "
            "use the model's Hugging Face directory instead"
        )
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=pre.whole_words,
        )
    )
    if normalizer := pre.normalizer():
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(pre.steps())
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_special_tokens(tokens, get, add_bos=pre.bos))


def _with_marked_spaces(tokens: list[str], kinds: list[int]) -> list[str]:
    """SentencePiece's own spelling of runs of spaces that are user-defined, which the makers of GGUF files
    write as they look in a text."""
    user_defined = {i for i, kind in enumerate(kinds) if kind == Piece.USER_DEFINED}
    return [
        token.replace(" ", "▁") if i in user_defined and not token.strip(" ") else token
        for i, token in enumerate(tokens)
    ]


def _sentencepiece(path, tokens: list[str], get) -> PreTrainedTokenizerFast:
    """LLaMA's scheme, as the SentencePiece model that the file was made from."""
    if get("remove_extra_whitespaces", False):
        raise UserError(
            f"{path} has a tokenizer that removes extra white space, which is not supported; "
            "use the model's Hugging Face directory instead"
        )
    special = _special_tokens(tokens, get, add_bos=True)
    scores, unknown = get("scores"), get("unknown_token_id", 0)
    kinds = list(get("token_type", [])) or [Piece.NORMAL] * len(tokens)
    kinds[unknown] = Piece.UNKNOWN
    pieces = zip(tokens, scores, kinds, strict=True)
    proto = ModelProto(pieces=[Piece(piece=piece, score=score, type=kind) for piece, score, kind in pieces])
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(tokens), Piece.BYTE in kinds
    spec.unk_id = unknown
    spec.bos_id, spec.eos_id, spec.pad_id = (
        get(key, -1) for key in ("bos_token_id", "eos_token_id", "padding_token_id")
    )
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = get("add_space_prefix", True)
    return sentencepiece.build(proto, **special)


def metadata(tokenizer: PreTrainedTokenizerFast, rows: int) -> dict:
    """What a GGUF file says of a tokenizer: the inverse of `load`.

    Args:
      tokenizer: of a kind that the format knows: byte-level BPE, or a SentencePiece BPE.
      rows: of the embedding; where there are more than tokens, unused ones are written for the others.

    Returns:
      The key-value pairs.

    Raises:
      UserError: for a tokenizer that the format cannot say, so that texts would be cut otherwise.
    """
    model = sentencepiece.model_of(tokenizer)
    if model is None:
        pieces, of_kind = _byte_level_pieces(tokenizer)
    else:
        pieces = {i: (piece.piece, piece.type, piece.score) for i, piece in enumerate(model.pieces)}
        prefix = model.normalizer_spec.add_dummy_prefix
        of_kind = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
    for i, token in tokenizer.added_tokens_decoder.items():
        kind = Piece.CONTROL if token.special else Piece.USER_DEFINED
        if pieces.get(i, ("", Piece.NORMAL, 0))[1] not in (Piece.UNKNOWN, Piece.BYTE):
            pieces[i] = (token.content, kind, -1000.0)
    table = [pieces.get(i, (f"[PAD{i}]", Piece.UNUSED, -1000.0)) for i in range(rows)]
    tokens, kinds, scores = map(list, zip(*table))
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id if (tokenizer.pad_token_id or 0) < rows else None,
    }
    ids = tokenizer("a")["input_ids"]
    pairs = {
        **of_kind,
        "tokens": tokens,
        "token_type": kinds,
        **({} if model is None else {"scores": scores}),
        **{key: value for key, value in special.items() if value is not None},
        "add_bos_token": ids[0] == tokenizer.bos_token_id,
        "add_eos_token": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }
    pairs = {f"tokenizer.ggml.{key}": value for key, value in pairs.items()}
    again = load(pairs, "the GGUF file")
    for text in sentencepiece.check_texts():
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise UserError(
                f"GGUF cannot say what this tokenizer is: {text!r:.60} would be cut otherwise; use the "
                "model's Hugging Face folder instead"
            )
    return pairs


def _byte_level_pieces(tokenizer: PreTrainedTokenizerFast) -> tuple[dict, dict]:
    """The tokens of a byte-level BPE by their numbers, and the pairs of that kind."""
    state, backend = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.backend_tokenizer
    model = state["model"]
    if model["type"] != "BPE" or b'"ByteLevel"' not in backend.decoder.__getstate__():
        raise UserError(
            f"GGUF is not written with a tokenizer of type {model['type']}: expected byte-level BPE or "
            "SentencePiece BPE; use the model's Hugging Face folder instead"
        )
    pieces = {i: (token, Piece.NORMAL, 0.0) for token, i in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return pieces, {"model": "gpt2", "pre": _pre_of(backend, model["ignore_merges"]), "merges": merges}


def _pre_of(backend: Tokenizer, whole_words: bool) -> str:
    """The name in GGUF of how a tokenizer cuts text into words.

    Raises:
      UserError: if it is none that is known here.
    """

    def cut(normalizer, pre_tokenizer):
        texts = sentencepiece.check_texts()
        texts = [normalizer.normalize_str(text) for text in texts] if normalizer else texts
        return [[word for word, _ in pre_tokenizer.pre_tokenize_str(text)] for text in texts]

    theirs = backend.pre_tokenizer and cut(backend.normalizer, backend.pre_tokenizer)
    for name, pre in PRE.items():
        ours = cut(pre.normalizer(), pre_tokenizers.Sequence(pre.steps()))
        if pre.whole_words == whole_words and ours == theirs:
            return name
    raise UserError(
        f"GGUF has no name for how this tokenizer cuts text into words: expected as {', '.join(PRE)} do; use "
        "the model's Hugging Face folder instead"
    )
