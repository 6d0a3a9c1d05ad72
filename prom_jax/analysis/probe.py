"""The cloze probe: how probable the English and the target word are after each block (the logit lens).

Every prompt of a table runs once. What all of them begin with, the demonstrations when these are shared, runs
as one row whose keys and values serve all; and the two words of a row, where both are read to their ends,
branch off one query.
"""

from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import pre_tokenizers

from prom_jax.analysis.cloze import Row, Table, prompts
from prom_jax.analysis.statistics import interval, resampled_means
from prom_jax.data.tokens import common_prefix
from prom_jax.models.inputs import Rows
from prom_jax.ops.attention import SHARED_PREFIX, segment_id
from prom_jax.parallel.sharding import constrain, place_rows
from prom_jax.utils.console import track
from prom_jax.utils.errors import UserError

SCORINGS = ("word", "prefix", "byte")
# Shapes are rounded up to multiples of these, so that few are compiled.
PREFIX_BUCKET, LENGTH_BUCKET, COLUMNS_BUCKET, ASKED_BUCKET = 64, 16, 4, 8
# The branches of a row, segments to attention: both words continue the query, which is SHARED_PREFIX.
ENGLISH, TARGET = segment_id(1, 0, 1), segment_id(1, 0, 2)


class NoRows(UserError):
    """No row of a table can be measured: with this tokenizer and scoring there is nothing to tell apart."""


@dataclass(frozen=True)
class Probe:
    """What was measured of one language.

    rows: those that were measured, each with its prompt.
    english, target: probability of either word, float64 [rows, layers]; column i - 1 is read after block i.
    shared: the part of `target` in tokens that more than half of the rows' targets can begin with; zeros
      under 'word', where it means nothing.
    dropped: how many rows were not measured, by reason.
    seed: of the choice of demonstrations and of the intervals.
    """

    language: str
    scoring: str
    rows: list[tuple[Row, str]]
    english: np.ndarray
    target: np.ndarray
    shared: np.ndarray
    dropped: dict[str, int]
    seed: int

    def difference(self, layer: int) -> tuple[float, float, float]:
        """Mean over rows of P_en − P_target after block `layer`, and its 95 % bootstrap interval."""
        difference = (self.english - self.target)[:, layer - 1]
        low, high = interval(resampled_means(difference, self.seed))
        return float(difference.mean()), float(low), float(high)

    def peak(self) -> tuple[int, int, int]:
        """The layer where the mean of P_en − P_target is largest, and its 95 % bootstrap interval."""
        difference = self.english - self.target
        low, high = interval(1 + resampled_means(difference, self.seed).argmax(axis=1))
        return 1 + int(difference.mean(axis=0).argmax()), int(low), int(high)

    def unreliable(self, layer: int) -> bool:
        """Whether P_target after block `layer` tells the script rather than the word: in more than half of
        the rows most of it is in tokens that more than half of the rows share. Score by 'word' then."""
        mostly_shared = self.shared[:, layer - 1] > self.target[:, layer - 1] / 2
        return bool(mostly_shared.mean() > 0.5)

    def summary(self) -> dict:
        """All of it in JSON's types, with means and 95 % intervals by layer, 1 … N."""
        curves = {
            "english": self.english,
            "target": self.target,
            "difference": self.english - self.target,
        }
        bands = {
            name: np.stack(interval(resampled_means(values, self.seed)), axis=1)
            for name, values in curves.items()
        }
        layers = range(1, 1 + self.english.shape[1])
        return {
            "scoring": self.scoring,
            "english_mean": _numbers(self.english.mean(axis=0)),
            "target_mean": _numbers(self.target.mean(axis=0)),
            "intervals": {name: [_numbers(ends) for ends in band] for name, band in bands.items()},
            "unreliable_layers": [layer for layer in layers if self.unreliable(layer)],
            "dropped": self.dropped,
            "rows": [
                {
                    "prompt": prompt,
                    "english_word": row.english,
                    "target_word": row.word,
                    "english": _numbers(english),
                    "target": _numbers(target),
                }
                for (row, prompt), english, target in zip(self.rows, self.english, self.target)
            ],
        }


def _numbers(values) -> list[float]:
    """To six digits: more are noise."""
    return [float(f"{value:.6g}") for value in values]


def probe(
    model,
    tokenizer,
    table: Table,
    *,
    scoring: str = "word",
    shots: int = 5,
    seed: int = 0,
    demonstrations: str = "shared",
    batch: int = 16,
) -> Probe:
    """Probability of the English and of the target word after blocks 1 … N, each read through the final norm
    and the main head; at N this is the model's own distribution.

    Args:
      model, tokenizer: of `models.load`; rows are spread over the model's mesh.
      scoring: what counts as the word after the prompt, which ends in `Answer: "`.
        'word': the whole word follows, the product over its tokens (no closing quotation mark).
        'prefix': the next token is a prefix of the word, in characters, with or without a space in front
        (Wendler et al. 2024). 'byte': or it is the first UTF-8 byte of a word that does not begin in ASCII.
      shots, seed, demonstrations: see `cloze.prompts`.
      batch: rows at a time.
    Raises:
      NoRows: if none is left to measure.
      UserError: for another scoring, a batch below 1, or as `cloze.prompts`.
    """
    if scoring not in SCORINGS:
        raise UserError(f"scoring={scoring!r}: expected one of {', '.join(SCORINGS)}")
    if batch < 1:
        raise UserError(f"batch={batch}: expected at least 1 row at a time")
    dropped, rows, questions = Counter(table.dropped), [], []
    for row, prompt in prompts(table, shots, seed, demonstrations):
        try:
            questions.append(_question(tokenizer, row, prompt, scoring))
            rows.append((row, prompt))
        except _Unanswerable as reason:
            dropped[str(reason)] += 1
    if not rows:
        reasons = ", ".join(f"{number} × {reason}" for reason, number in dropped.items())
        raise NoRows(
            f"no row of the table of {table.language!r} can be measured with scoring={scoring!r} "
            f"({reasons}): try scoring 'word', or fix the table"
        )
    answers = _answer(model, questions, batch, f"probing {table.language}")
    combine = (lambda logs: np.exp(logs.sum(axis=1))) if scoring == "word" else _mass
    shared = _shared_tokens(questions) if scoring != "word" else []
    pairs = list(zip(questions, answers))
    return Probe(
        language=table.language,
        scoring=scoring,
        rows=rows,
        english=np.stack([combine(logs[:, : question.english]) for question, logs in pairs]),
        target=np.stack([combine(logs[:, question.english :]) for question, logs in pairs]),
        shared=np.stack([_mass(logs[:, np.isin(question.ids, shared)]) for question, logs in pairs]),
        dropped=dict(dropped),
        seed=seed,
    )


def _mass(logs_NQ) -> np.ndarray:
    return np.exp(logs_NQ).sum(axis=1)


# What is asked of each row.


class _Unanswerable(Exception):
    """Why a row cannot be measured."""


@dataclass(frozen=True)
class _Question:
    """One row as the model sees it, and what is read off it.

    tokens, positions, branches: int [T].
    columns, ids: int [Q], pairs of a column of the row and a token whose log-probability is read there.
    english: how many of the pairs, the first ones, are the English word's; the others are the target's.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    columns: np.ndarray
    ids: np.ndarray
    english: int


def _question(tokenizer, row: Row, prompt: str, scoring: str) -> _Question:
    if scoring == "word":
        return _whole_words(tokenizer, row, prompt)
    return _first_tokens(tokenizer, row, prompt, scoring)


def _first_tokens(tokenizer, row: Row, prompt: str, scoring: str) -> _Question:
    """Asks at the prompt's last column for all tokens that can begin either word."""
    english, target = (word_starts(tokenizer, word, scoring) for word in (row.english, row.word))
    if not english or not target:
        raise _Unanswerable(f"no token begins its {'target' if english else 'English'} word")
    if set(english) & set(target):
        raise _Unanswerable("one token begins both of its words")
    tokens, _ = _encode(tokenizer, prompt)
    length, ids = len(tokens), np.array(english + target)
    last = np.full(len(ids), length - 1)
    return _Question(tokens, np.arange(length), np.full(length, SHARED_PREFIX), last, ids, len(english))


def _whole_words(tokenizer, row: Row, prompt: str) -> _Question:
    """Asks for every token of both words, each after those before it.

    Prompt and word are tokenised together. A token that covers both the quotation mark and the word's
    first character counts as the word's.
    """
    if row.english == row.word:
        raise _Unanswerable("its English and target word are equal")
    (english, english_ends), (target, target_ends) = (
        _encode(tokenizer, prompt + word) for word in (row.english, row.word)
    )
    common = common_prefix(english, target)
    branch = len(english) - common
    columns, ids = [], []
    for tokens, ends, shift in ((english, english_ends, 0), (target, target_ends, branch)):
        own = np.flatnonzero(ends > len(prompt))
        if tokenizer.unk_token_id in tokens[own]:
            raise _Unanswerable("the tokenizer cannot spell one of its words")
        columns.append(np.where(own - 1 < common, own - 1, own - 1 + shift))
        ids.append(tokens[own])
    return _Question(
        np.concatenate([english, target[common:]]),
        np.concatenate([np.arange(len(english)), np.arange(common, len(target))]),
        np.repeat([SHARED_PREFIX, ENGLISH, TARGET], [common, branch, len(target) - common]),
        np.concatenate(columns),
        np.concatenate(ids),
        len(ids[0]),
    )


def word_starts(tokenizer, word: str, scoring: str) -> list[int]:
    """Tokens that can begin a word: its prefixes, in characters, that are one token, with and without a space
    in front; for 'byte' also the first UTF-8 byte, where the first character is not ASCII."""
    backend = tokenizer.backend_tokenizer
    if b'"ByteLevel"' in backend.decoder.__getstate__():
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

        def spell(text):
            return alphabet.pre_tokenize_str(text)[0][0]

        first_byte = spell(word)[0]
    else:

        def spell(text):
            return text.replace(" ", "▁")

        first_byte = f"<0x{word.encode()[0]:02X}>"
    spelled = [spell(space + word[:end]) for end in range(1, len(word) + 1) for space in ("", " ")]
    if scoring == "byte" and not word[0].isascii():
        spelled.append(first_byte)
    ids = (backend.token_to_id(token) for token in dict.fromkeys(spelled))
    return [token for token in ids if token is not None]


def _encode(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, with BOS as the tokenizer adds it, and where in the text each ends."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    first = tokenizer("a")["input_ids"][0]
    bos = [first] if first == tokenizer.bos_token_id else []
    ends = [end for _, end in encoded["offset_mapping"]]
    return np.array(bos + encoded["input_ids"]), np.array([0] * len(bos) + ends)


def _shared_tokens(questions: list[_Question]) -> list[int]:
    """Tokens that more than half of the targets can begin with."""
    counts = Counter(token for question in questions for token in question.ids[question.english :].tolist())
    return [token for token, count in counts.items() if count > len(questions) / 2]


# What the model answers.


def _answer(model, questions: list[_Question], batch: int, what: str) -> list[np.ndarray]:
    """Log-probabilities of what each question asks for, float64 [N, Q]."""
    first = questions[0].tokens
    prefix = min(
        min(
            common_prefix(first, question.tokens),
            question.columns.min(),
            np.sum(question.branches == SHARED_PREFIX),
        )
        for question in questions
    )
    # Batches of rows of similar cost: a column that is read costs more than one that is passed through.
    order = sorted(
        range(len(questions)), key=lambda i: (len(set(questions[i].columns)), len(questions[i].tokens))
    )
    groups = np.array_split(order, -(-len(order) // batch))
    answers = {}
    with jax.set_mesh(model.mesh):
        shared = _pad([first[:prefix]], 1, PREFIX_BUCKET)
        cache = _run_prefix(model, shared, prefix)
        for group in track(groups, what, len(groups)):
            rows = _rows([questions[i] for i in group], len(groups[0]), prefix)
            logs = np.asarray(_read(model, cache, place_rows(model.mesh, rows)), float)
            answers |= {i: logs[:, row, : len(questions[i].ids)] for row, i in enumerate(group)}
    return [answers[i] for i in range(len(questions))]


def _rows(questions: list[_Question], number: int, prefix: int) -> dict[str, np.ndarray]:
    """The arrays of a batch of `number` rows, without the `prefix` tokens that they share.

    tokens, positions, branches: [B, T]; columns: [B, M], the different ones that are read; at, ids: [B, Q],
    which of these, and the token.
    """
    columns, at = zip(*(np.unique(question.columns - prefix, return_inverse=True) for question in questions))

    def tails(name):
        return [getattr(question, name)[prefix:] for question in questions]

    return {
        "tokens": _pad(tails("tokens"), number, LENGTH_BUCKET),
        "positions": _pad(tails("positions"), number, LENGTH_BUCKET),
        "branches": _pad(tails("branches"), number, LENGTH_BUCKET),
        "columns": _pad(columns, number, COLUMNS_BUCKET if max(map(len, columns)) > 1 else 1),
        "at": _pad(at, number, ASKED_BUCKET),
        "ids": _pad([question.ids for question in questions], number, ASKED_BUCKET),
    }


def _pad(parts, number: int, bucket: int) -> np.ndarray:
    """Rows of different lengths as int32 [number, L], L a multiple of `bucket` and not 0."""
    length = -(-max(1, *map(len, parts)) // bucket) * bucket
    padded = np.zeros((number, length), np.int32)
    for row, part in zip(padded, parts):
        row[: len(part)] = part
    return padded


@jax.jit
def _run_prefix(model, tokens_1P, prefix):
    """Keys and values of the first `prefix` tokens, with which all rows begin; the others are padding."""
    length = tokens_1P.shape[1]
    segments = jnp.where(jnp.arange(length) < prefix, SHARED_PREFIX, 0)[None]
    cache = model.empty_cache(1, length)
    return model.forward(Rows(tokens_1P, segments=segments), cache=cache, slot=0).cache


@jax.jit
def _read(model, cache, rows):
    """Log-probabilities of the rows' `ids` after each block, float32 [N, B, Q], all on every device.

    Only the columns that are read reach the head, and the logits of one layer alone are in memory.
    """

    def lens(x_BTD):
        read = jnp.take_along_axis(x_BTD, rows["columns"][..., None], axis=1)
        logits_BMV = model.logits(read)
        normalizers = jax.nn.logsumexp(logits_BMV, axis=-1)
        asked = jax.vmap(lambda logits, at, ids: logits[at, ids])(logits_BMV, rows["at"], rows["ids"])
        return asked - jnp.take_along_axis(normalizers, rows["at"], axis=1)

    inputs = Rows(rows["tokens"], rows["positions"], rows["branches"])
    return constrain(model.forward(inputs, cache=cache, collect=lens).collected)
