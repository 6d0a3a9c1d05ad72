"""SentencePiece models, of a `tokenizer.model` or rebuilt from a GGUF file, as tokenizers of transformers.

Where the tokenizers library can say what a model does, the tokenizer is built of its parts, and can be saved
as a tokenizer.json. Where it cannot, the sentencepiece library cuts the text: of two pairs of pieces with
one score it merges the left one first, and ranked merges know no ties. Vocabularies that were extended for a
language, by pieces at score 0, are of that kind.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from prom_jax.tokenization.base import PreTrainedTokenizerFast
from prom_jax.tokenization.checks import check_lengths
from prom_jax.utils.errors import UserError

FILE = "tokenizer.model"
Piece = ModelProto.SentencePiece
PROMPTS = Path(__file__).parents[1] / "resources" / "prompts"
LONGEST_RUN = 1_000_000  # of spaces
_SPACE = "▁"


class SentencePieceTokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose vocabulary is a SentencePiece model.

    Attributes:
      model_file: the content of its `tokenizer.model`, which an export keeps.
      splitter: the pre-tokenizer that cuts text with the sentencepiece library; None where the tokenizers
        library does it all.
    """

    model_file: bytes
    splitter: pre_tokenizers.PreTokenizer | None = None

    def __getstate__(self) -> dict:
        """What a process that shares the work is sent: the library's part is made there again."""
        with serializable(self) as by_library:
            if not by_library:
                return self.__dict__
            backend = Tokenizer.from_str(self.backend_tokenizer.to_str())
        return self.__dict__ | {"_tokenizer": backend, "splitter": True}

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        if self.splitter:
            self.splitter = _splitter(_proto(self.model_file))
            self.backend_tokenizer.pre_tokenizer = self.splitter


@contextlib.contextmanager
def serializable(tokenizer: PreTrainedTokenizerFast):
    """Any tokenizer, for as long as the context lasts without what the sentencepiece library does of it: what
    a tokenizer.json can hold. Gives whether that is not all of it."""
    splitter = getattr(tokenizer, "splitter", None)
    if splitter is None:
        yield False
        return
    tokenizer.backend_tokenizer.pre_tokenizer = None
    try:
        yield True
    finally:
        tokenizer.backend_tokenizer.pre_tokenizer = splitter


def read(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a folder with a `tokenizer.model` and no tokenizer.json: what the sentencepiece
    library makes of a text, and the special tokens of `tokenizer_config.json`, with BOS as in LLaMA's own
    where that says nothing of it.

    Raises:
      ValueError: if it is no SentencePiece model.
      UserError: for a setting that cannot be honoured.
    """
    content = (path / FILE).read_bytes()
    proto = _proto(content)
    config = path / "tokenizer_config.json"
    config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    spec = proto.trainer_spec
    pieces = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    own = {name: proto.pieces[i].piece for name, i in pieces.items() if 0 <= i < len(proto.pieces)}
    defaults = {name: piece for name, piece in own.items() if name not in config}
    tokenizer = build(proto, path, **defaults)
    tokenizer.model_file, tokenizer.name_or_path = content, str(path)
    tokenizer.add_bos_token = config.get("add_bos_token", True)
    tokenizer.add_eos_token = config.get("add_eos_token", False)
    return tokenizer


def is_model(path: Path) -> bool:
    """Whether a file is a SentencePiece model: Llama 3's of that name is not."""
    try:
        return bool(_proto(path.read_bytes()))
    except ValueError:
        return False


def differences(tokenizer: SentencePieceTokenizer) -> list[str]:
    """The texts, of some in many scripts, that a tokenizer cuts otherwise than its model."""
    return _differences(tokenizer.backend_tokenizer, _processor(_proto(tokenizer.model_file)))


def model_of(tokenizer: PreTrainedTokenizerFast) -> ModelProto | None:
    """The SentencePiece model of a tokenizer: its own, or one made again of the ranks of its merges; None
    where there is none that cuts the check texts as it does."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _proto(tokenizer.model_file)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if state["type"] != "BPE" or not state["byte_fallback"] or state["unk_token"] is None:
        return None
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in state["merges"])
    ranks = {}
    for rank, halves in enumerate(merges):
        ranks.setdefault("".join(halves), -float(rank))
    proto, added = ModelProto(), {token.content for token in tokenizer.added_tokens_decoder.values()}
    for piece in sorted(state["vocab"], key=state["vocab"].get):
        byte = len(piece) == 6 and piece.startswith("<0x")
        kind = Piece.BYTE if byte else Piece.CONTROL if piece in added else Piece.NORMAL
        kind = Piece.UNKNOWN if piece == state["unk_token"] else kind
        proto.pieces.add(
            piece=piece, type=kind, score=ranks.get(piece, 0.0 if kind != Piece.NORMAL else -1e9)
        )
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = TrainerSpec.BPE, True, len(proto.pieces)
    spec.unk_id = state["vocab"][state["unk_token"]]
    spec.bos_id, spec.eos_id, spec.pad_id = (
        state["vocab"].get(token, -1)
        for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    )
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens
    normalizer.add_dummy_prefix = first[0].startswith(_SPACE)
    try:
        return None if _differences(tokenizer.backend_tokenizer, _processor(proto)) else proto
    except ValueError:
        return None


def build(proto: ModelProto, folder: Path | None = None, **settings) -> SentencePieceTokenizer:
    """A tokenizer that cuts texts as the sentencepiece library does.

    Text after a special token begins as a text does, with the model's prefix space.

    Args:
      proto: the model.
      folder: whose other files say more of the tokenizer; None for none.
      settings: of the class of transformers.

    Returns:
      The tokenizer.

    Raises:
      UserError: for a setting that cannot be honoured.
      ValueError: for a model that the library refuses.
    """
    _check_settings(proto)
    check_lengths(piece.piece for piece in proto.pieces)
    reference = _processor(proto)
    backend, splitter = _backend(proto, by_library=False), None
    if _needs_library(proto) or _differences(backend, reference):
        backend, splitter = _backend(proto, by_library=True), _splitter(proto)
        backend.pre_tokenizer = splitter
        if _differences(backend, reference):
            raise ValueError("texts come out otherwise than in the sentencepiece library")
        backend.pre_tokenizer = None
    # By files, as transformers has no other way to take what they say of added tokens and templates.
    with tempfile.TemporaryDirectory() as local:
        for path in folder.glob("*") if folder else ():
            if path.suffix in (".json", ".jinja") and path.name not in (
                "config.json",
                "generation_config.json",
            ):
                shutil.copy(path, local)
        backend.save(f"{local}/tokenizer.json")
        tokenizer = SentencePieceTokenizer.from_pretrained(local, **settings)
    tokenizer.model_file, tokenizer.splitter = proto.SerializeToString(), splitter
    if splitter:
        tokenizer.backend_tokenizer.pre_tokenizer = splitter
    return tokenizer


def _check_settings(proto: ModelProto):
    """Raises UserError for what neither library does behind the interface of a tokenizer. The tokenizers
    library has a normaliser by maps of characters, but it loses some of several that Unicode takes as one,
    in Bengali, Malayalam and Tamil text too."""
    normalizer, spec = proto.normalizer_spec, proto.trainer_spec
    kind = TrainerSpec.ModelType.Name(spec.model_type).lower()
    mapped = normalizer.name if normalizer.precompiled_charsmap else "identity"
    for name, value, expected in (
        ("model_type", kind, ("bpe", "unigram")),
        ("normalization_rule_name", mapped, ("identity",)),
        ("escape_whitespaces", normalizer.escape_whitespaces, (True,)),
        ("treat_whitespace_as_suffix", spec.treat_whitespace_as_suffix, (False,)),
        ("denormalization_rule_tsv", bool(proto.denormalizer_spec.precompiled_charsmap), (False,)),
    ):
        if value not in expected:
            raise UserError(
                f"{FILE} sets {name}={value}, which is not supported: expected "
                f"{' or '.join(map(str, expected))}; use a tokenizer.json of the model"
            )


def _needs_library(proto: ModelProto) -> bool:
    """Whether the tokenizers library has no words for it: user-defined pieces in a unigram model, or where a
    text gets a prefix; several pieces of one score that may compete; or, in a unigram model, characters of
    control pieces that are no pieces themselves."""
    normal = {piece.piece for piece in proto.pieces if piece.type == Piece.NORMAL}
    user_defined = any(piece.type == Piece.USER_DEFINED for piece in proto.pieces)
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        spelled = itertools.chain(*(piece.piece for piece in proto.pieces if piece.piece not in normal))
        return user_defined or not normal.issuperset(spelled)
    if user_defined and proto.normalizer_spec.add_dummy_prefix:
        return True
    merged = [piece for piece in proto.pieces if piece.type == Piece.NORMAL and len(piece.piece) > 1]
    # Runs of one character, as LLaMA's of spaces, grow from the left by ranks as well.
    runs = {piece.score for piece in merged if len(set(piece.piece)) == 1}
    others = [piece.score for piece in merged if len(set(piece.piece)) > 1]
    return len({*others}) < len(others) or not runs.isdisjoint(others)


def _backend(proto: ModelProto, by_library: bool) -> Tokenizer:
    """The steps of the tokenizers library; with those of the sentencepiece library in place of merges, pieces
    come ready cut and are looked up."""
    spec = proto.trainer_spec
    if spec.model_type == TrainerSpec.UNIGRAM and not by_library:
        scored = _unigram_vocab(proto)
        model = models.Unigram(scored, _unknown(proto)[0], spec.byte_fallback)
    else:
        vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        if len(vocab) < len(proto.pieces):
            raise ValueError("it has a piece twice")
        model = models.BPE(
            vocab,
            [] if by_library else ranked_merges(proto),
            unk_token=_unknown(proto)[1],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            ignore_merges=by_library,
        )
    backend = Tokenizer(model)
    normalizer = proto.normalizer_spec
    backend.normalizer = normalizers.Sequence(_normalizers(proto))
    # Leading spaces that are not the text's.
    leading = LONGEST_RUN if normalizer.remove_extra_whitespaces else int(normalizer.add_dummy_prefix)
    strip = [decoders.Strip(" ", leading, 0)] if leading else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = (Piece.CONTROL, Piece.UNKNOWN, *(() if by_library else (Piece.USER_DEFINED,)))
    added = [
        AddedToken(piece.piece, special=piece.type != Piece.USER_DEFINED, normalized=False)
        for piece in proto.pieces
        if piece.type in kinds
    ]
    backend.add_tokens(added)
    return backend


def _unknown(proto: ModelProto) -> tuple[int, str]:
    return next((i, p.piece) for i, p in enumerate(proto.pieces) if p.type == Piece.UNKNOWN)


def _unigram_vocab(proto: ModelProto) -> list[tuple[str, float]]:
    """Pieces with their scores; those that no text is cut into with less than their characters have."""
    least = min(piece.score for piece in proto.pieces if piece.type == Piece.NORMAL) - 10
    return [
        (piece.piece, piece.score if piece.type == Piece.NORMAL else least * (len(piece.piece) + 1))
        for piece in proto.pieces
    ]


def _normalizers(proto: ModelProto) -> list:
    spec, steps = proto.normalizer_spec, []
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]


def ranked_merges(proto: ModelProto) -> list[tuple[str, str]]:
    """The merges that the scores stand for: each way to halve a piece, by falling score.

    Of equal score, the longer left half first. User-defined pieces, such as Gemma's runs of spaces, come
    before all others.
    """
    ranks = {Piece.USER_DEFINED: -math.inf}
    vocab = {
        piece.piece: (ranks.get(piece.type, -piece.score), i)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (Piece.NORMAL, Piece.USER_DEFINED)
    }
    halves = (
        (rank, -cut, cut - len(token), i, token)
        for token, (rank, i) in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    return [(token[:-minus], token[-minus:]) for _, minus, _, _, token in sorted(halves)]


def _proto(content: bytes) -> ModelProto:
    try:
        proto = ModelProto.FromString(content)
    except DecodeError as error:
        raise ValueError("it is no SentencePiece model") from error
    if not proto.pieces:
        raise ValueError("it has no pieces")
    return proto


def _processor(proto: ModelProto) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _splitter(proto: ModelProto) -> pre_tokenizers.PreTokenizer:
    """Cuts normalised text into pieces with the sentencepiece library. What no piece is for comes as it is
    spelled: bytes are for the tokenizers library to make."""
    plain = ModelProto.FromString(proto.SerializeToString())
    plain.normalizer_spec.Clear()
    plain.normalizer_spec.name = "identity"
    plain.normalizer_spec.add_dummy_prefix = plain.normalizer_spec.remove_extra_whitespaces = False
    plain.normalizer_spec.escape_whitespaces = False
    plain.trainer_spec.byte_fallback = False
    for piece in plain.pieces:
        if piece.type == Piece.BYTE:
            piece.type = Piece.UNUSED
    return pre_tokenizers.PreTokenizer.custom(_Splitter(_processor(plain)))


class _Splitter:
    def __init__(self, processor: SentencePieceProcessor):
        self._processor = processor

    def pre_tokenize(self, text):
        """Called by the tokenizers library for each stretch of text between special tokens."""
        text.split(self._split)

    def _split(self, _, text):
        ends = list(itertools.accumulate(map(len, self._processor.encode(text.normalized, out_type=str))))
        return [text[start:end] for start, end in itertools.pairwise((0, *ends))]


@functools.cache
def check_texts() -> list[str]:
    """Texts in the scripts of all languages that there are prompts for, and what tokenizers differ in."""
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PROMPTS.glob("*.json"))]
    prose = [text for table in tables for text in (table["preamble"], *table["translate"])]
    odd = [
        "  two  spaces at\teach  end\n\n ",
        "ﬁ① Ａ e\u0301\u200b",
        "x1234567 3.14",
        "𝔘😀",
        "▁a ▁",
        "aa " * 9,
    ]
    return [*prose, *odd, *(f"a{' ' * n}b{'=' * n}" for n in range(1, 40))]


def _differences(backend: Tokenizer, reference: SentencePieceProcessor) -> list[str]:
    texts = check_texts()
    encoded = backend.encode_batch(texts, add_special_tokens=False)
    return [text for text, ours, ids in zip(texts, encoded, reference.encode(texts)) if ours.ids != ids]
