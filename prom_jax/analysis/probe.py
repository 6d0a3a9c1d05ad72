"""The probe: how probable the English and the target word are after each block (the logit lens).

Every prompt of a task runs once. What all of them begin with, the demonstrations when these are shared, runs
as one row whose keys and values serve all; and the right words of a row, where they are read to their ends,
branch off one query.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import pre_tokenizers

from prom_jax.analysis.statistics import (
    effective_rows,
    interval,
    mean_interval,
    resampled_means,
    share_interval,
)
from prom_jax.analysis.tables import Table
from prom_jax.analysis.tasks import NoRows, Row, ask, prompts
from prom_jax.data.tokens import common_prefix
from prom_jax.models.inputs import Rows
from prom_jax.ops.attention import MAX_SEGMENTS, SHARED_PREFIX, segment_id
from prom_jax.parallel.sharding import constrain, place_rows
from prom_jax.utils.console import track
from prom_jax.utils.errors import UserError

SCORINGS = ("word", "prefix", "byte")
FAINT = 0.01  # probability below which a word is as good as unknown
# Shapes are rounded up to multiples of these, so that few are compiled.
PREFIX_BUCKET, LENGTH_BUCKET, COLUMNS_BUCKET, ASKED_BUCKET = 64, 16, 4, 8


class Lead(NamedTuple):
    """In which share of the rows English leads after a block, and the 95 % interval of that share."""

    layer: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Probe:
    """What was measured of one language.

    Attributes:
      language, task, sources, scoring: of what; see `tasks.Questions` and `probe`.
      layers: after which blocks; column i of the arrays is read after block `layers[i]`.
      rows: those that were measured, each with its prompt.
      english, target: probability of a right word of either language, float64 [rows, layers].
      shared: the part of `target` in tokens that more than half of the rows' targets can begin with; zeros
        under 'word', where it means nothing.
      dropped: how many rows were not measured, by reason.
      seed: of the choice of demonstrations and of the intervals.
    """

    language: str
    task: str
    sources: tuple[str, ...]
    scoring: str
    layers: tuple[int, ...]
    rows: list[tuple[Row, str]]
    english: np.ndarray
    target: np.ndarray
    shared: np.ndarray
    dropped: dict[str, int]
    seed: int

    def column(self, layer: int) -> int:
        """Where the arrays have what was read after block `layer`."""
        return self.layers.index(layer)

    def difference(self, layer: int) -> tuple[float, float, float]:
        """Mean over rows of P_en − P_target after block `layer`, and its 95 % interval."""
        values = (self.english - self.target)[:, self.column(layer)]
        low, high = mean_interval(values, -1, 1, self.seed)
        return float(values.mean()), float(low), float(high)

    def peak(self) -> tuple[int, int, int]:
        """The layer where the mean of P_en − P_target is largest, and between which layers it lies in 95 % of
        the resamples of the rows."""
        difference = self.english - self.target
        best = int(difference.mean(axis=0).argmax())
        low, high = interval(resampled_means(difference, self.seed).argmax(axis=1))
        return self.layers[best], self.layers[int(low)], self.layers[int(high)]

    def lead(self, layer: int) -> Lead:
        """In how many rows the English word leads after block `layer` and is at least `FAINT`: where a model
        knows neither word the one of fewer tokens leads, which says nothing."""
        english, target = (values[:, self.column(layer)] for values in (self.english, self.target))
        leads = (english > target) & (english >= FAINT)
        return Lead(layer, float(leads.mean()), *share_interval(int(leads.sum()), len(leads)))

    def strength(self) -> Lead:
        """The lead after the block where English leads in most rows; of several, where its mean does."""
        means = (self.english - self.target).mean(axis=0)
        leads = zip(map(self.lead, self.layers), means)
        return max(leads, key=lambda found: (found[0].share, found[1]))[0]

    def unreliable(self, layer: int) -> bool:
        """Whether P_target after block `layer` tells the script rather than the word: in more than half of
        the rows most of it is in tokens that more than half of the rows share. Score by 'word' then."""
        column = self.column(layer)
        mostly_shared = self.shared[:, column] > self.target[:, column] / 2
        return bool(mostly_shared.mean() > 0.5)

    def summary(self) -> dict:
        """All of it in JSON's types, with means, 95 % intervals and effective numbers of rows by layer."""
        difference = self.english - self.target
        intervals = {
            "english": mean_interval(self.english, 0, 1, self.seed),
            "target": mean_interval(self.target, 0, 1, self.seed),
            "difference": mean_interval(difference, -1, 1, self.seed),
        }
        effective = {"english": self.english, "target": self.target, "difference": difference}
        leads = [self.lead(layer) for layer in self.layers]
        return {
            "task": self.task,
            "sources": list(self.sources),
            "scoring": self.scoring,
            "english_mean": _numbers(self.english.mean(axis=0)),
            "target_mean": _numbers(self.target.mean(axis=0)),
            "intervals": {name: [_numbers(ends) for ends in zip(*band)] for name, band in intervals.items()},
            "effective_rows": {name: _numbers(effective_rows(values)) for name, values in effective.items()},
            "english_leads": [
                {"share": _number(lead.share), "interval": _numbers((lead.low, lead.high))} for lead in leads
            ],
            "strength": self.strength()._asdict(),
            "unreliable_layers": [layer for layer in self.layers if self.unreliable(layer)],
            "dropped": self.dropped,
            "rows": [
                {
                    "prompt": prompt,
                    "english_word": ", ".join(row.english),
                    "target_word": ", ".join(row.words),
                    "source": row.source,
                    "english": _numbers(english),
                    "target": _numbers(target),
                }
                for (row, prompt), english, target in zip(self.rows, self.english, self.target)
            ],
        }


def _number(value) -> float:
    """To six digits: more are noise."""
    return float(f"{value:.6g}")


def _numbers(values) -> list[float]:
    return [_number(value) for value in values]


def averaged(probes: Sequence[Probe]) -> Probe:
    """One probe of several with other demonstrations: each word's probabilities are their mean over those in
    which it was asked for. So a word counts once, however often it was asked for.

    Args:
      probes: of one task, language and model, after the same blocks.

    Returns:
      The probe, with the words in order of their first mention.
    """
    first, found = probes[0], {}
    for result in probes:
        for number, row in enumerate(result.rows):
            found.setdefault(row[0], []).append((row, result, number))

    def mean(name: str) -> np.ndarray:
        return np.stack(
            [np.mean([getattr(result, name)[n] for _, result, n in of], axis=0) for of in found.values()]
        )

    return replace(
        first,
        rows=[of[0][0] for of in found.values()],
        english=mean("english"),
        target=mean("target"),
        shared=mean("shared"),
    )


def probe(
    model,
    tokenizer,
    table: Table,
    *,
    task: str = "cloze",
    sources: Sequence[Table] = (),
    scoring: str = "word",
    shots: int = 5,
    seed: int = 0,
    demonstrations: str = "shared",
    batch: int = 16,
    layers: Sequence[int] = (),
) -> Probe:
    """Probability of the English and of the target word after blocks 1 … N, each read through the final norm
    and the main head; at N this is the model's own distribution.

    Args:
      model, tokenizer: of `models.load`; rows are spread over the model's mesh.
      table: of the language.
      task, sources: see `tasks.ask`.
      scoring: what counts as a word after the prompt, which ends in the quotation mark that opens the answer.
        'word': the whole word follows, the product over its tokens (no closing quotation mark).
        'prefix': the next token is a prefix of the word, in characters, with or without a space in front
        (Wendler et al. 2024). 'byte': or it is the first UTF-8 byte of a word that does not begin in ASCII.
        Where several words are right, any of them counts.
      shots, seed, demonstrations: see `tasks.prompts`.
      batch: rows at a time.
      layers: after which blocks to read; empty for all. Fewer take less time.

    Returns:
      What was measured.

    Raises:
      NoRows: if none is left to measure.
      UserError: for another scoring, a batch below 1, or as `tasks.ask` and `tasks.prompts`.
    """
    if scoring not in SCORINGS:
        raise UserError(f"scoring={scoring!r}: expected one of {', '.join(SCORINGS)}")
    if batch < 1:
        raise UserError(f"batch={batch}: expected at least 1 row at a time")
    asked = ask(task, table, sources)
    dropped, rows, questions = Counter(asked.dropped), [], []
    for row, prompt in prompts(asked, shots, seed, demonstrations):
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
    layers = tuple(layers) or tuple(range(1, 1 + model.config.num_hidden_layers))
    answers = _answer(model, questions, batch, layers, f"probing {table.language}")
    shared = _shared_tokens(questions) if scoring != "word" else []
    pairs = list(zip(questions, answers))
    english, target = zip(*(question.probabilities(logs) for question, logs in pairs))
    return Probe(
        language=table.language,
        task=task,
        sources=asked.sources,
        scoring=scoring,
        layers=layers,
        rows=rows,
        english=np.stack(english),
        target=np.stack(target),
        shared=np.stack(
            [np.exp(logs[:, np.isin(question.ids, shared)]).sum(axis=1) for question, logs in pairs]
        ),
        dropped=dict(dropped),
        seed=seed,
    )


# What is asked of each row.


class _Unanswerable(Exception):
    """Why a row cannot be measured."""


@dataclass(frozen=True)
class _Question:
    """One row as the model sees it, and what is read off it.

    A word is there when the tokens that are asked for it all are, each at its column; of several words (with
    'prefix' and 'byte': of several tokens that can begin a word) any will do. No two can be there at once.

    Attributes:
      tokens, positions, branches: int [T].
      columns, ids: int [Q], pairs of a column of the row and a token whose log-probability is read there.
      starts: int [W], where among the pairs each word's begin.
      english: how many of the words, the first ones, are English; the others are the target's.
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    columns: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    english: int

    @property
    def target_ids(self) -> np.ndarray:
        """The tokens of the target's words."""
        return self.ids[self.starts[self.english] :]

    def probabilities(self, logs_NQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of an English and of a target word, [N] each."""
        of_words_NW = np.exp(np.add.reduceat(logs_NQ, self.starts, axis=1))
        return of_words_NW[:, : self.english].sum(axis=1), of_words_NW[:, self.english :].sum(axis=1)


def _question(tokenizer, row: Row, prompt: str, scoring: str) -> _Question:
    if scoring == "word":
        return _whole_words(tokenizer, row, prompt)
    return _first_tokens(tokenizer, row, prompt, scoring)


def _first_tokens(tokenizer, row: Row, prompt: str, scoring: str) -> _Question:
    """Asks at the prompt's last column for all tokens that can begin a right word."""
    english, target = (
        list(dict.fromkeys(token for word in words for token in word_starts(tokenizer, word, scoring)))
        for words in (row.english, row.words)
    )
    if not english or not target:
        raise _Unanswerable(f"no token begins its {'target' if english else 'English'} word")
    if set(english) & set(target):
        raise _Unanswerable("one token begins both of its words")
    tokens, _ = _encode(tokenizer, prompt)
    length, ids = len(tokens), np.array(english + target)
    return _Question(
        tokens,
        np.arange(length),
        np.full(length, SHARED_PREFIX),
        np.full(len(ids), length - 1),
        ids,
        np.arange(len(ids)),
        len(english),
    )


def _whole_words(tokenizer, row: Row, prompt: str) -> _Question:
    """Asks for every token of all right words, each after those before it.

    Prompt and word are tokenised together. A token that covers both the quotation mark and the word's
    first character counts as the word's.
    """
    if set(row.english) & set(row.words):
        raise _Unanswerable("its English and target word are equal")
    english, target = (_spellings(tokenizer, prompt, words) for words in (row.english, row.words))
    words = [*english, *target]
    if len(words) > MAX_SEGMENTS:
        raise _Unanswerable(f"it has more than {MAX_SEGMENTS} right words")
    common = min(common_prefix(words[0].tokens, word.tokens) for word in words)
    lengths = [len(word.tokens) - common for word in words]  # of the branches, one after the other
    shifts = np.cumsum([0, *lengths[:-1]])
    columns = [np.where(w.own <= common, w.own - 1, w.own - 1 + shift) for w, shift in zip(words, shifts)]
    ids = [SHARED_PREFIX, *(segment_id(1, 0, number) for number in range(1, 1 + len(words)))]
    return _Question(
        np.concatenate([words[0].tokens[:common], *(word.tokens[common:] for word in words)]),
        np.concatenate([np.arange(common), *(np.arange(common, len(word.tokens)) for word in words)]),
        np.repeat(ids, [common, *lengths]),
        np.concatenate(columns),
        np.concatenate([word.tokens[word.own] for word in words]),
        np.cumsum([0, *(len(word.own) for word in words[:-1])]),
        len(english),
    )


class _Spelling(NamedTuple):
    """A word after its prompt: the tokens of both, and which of them are the word's."""

    tokens: np.ndarray
    own: np.ndarray


def _spellings(tokenizer, prompt: str, words: tuple[str, ...]) -> list[_Spelling]:
    """Each word's, but for words whose tokens begin with another's: that one is there with them."""
    found = []
    for word in words:
        tokens, ends = _encode(tokenizer, prompt + word)
        found.append(_Spelling(tokens, np.flatnonzero(ends > len(prompt))))
    found.sort(key=lambda spelling: len(spelling.tokens))
    kept = []
    for spelling in found:
        if tokenizer.unk_token_id in spelling.tokens[spelling.own]:
            raise _Unanswerable("the tokenizer cannot spell one of its words")
        if all(common_prefix(other.tokens, spelling.tokens) < len(other.tokens) for other in kept):
            kept.append(spelling)
    return kept


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
    counts = Counter(token for question in questions for token in question.target_ids.tolist())
    return [token for token, count in counts.items() if count > len(questions) / 2]


# What the model answers.


def _answer(model, questions: list[_Question], batch: int, layers: tuple, what: str) -> list[np.ndarray]:
    """Log-probabilities of what each question asks for, after each of the layers, float64 [N, Q]."""
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
            logs = np.asarray(_read(model, cache, place_rows(model.mesh, rows), layers), float)
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


@functools.partial(jax.jit, static_argnames="layers")
def _read(model, cache, rows, layers: tuple[int, ...]):
    """Log-probabilities of the rows' `ids` after each of the layers, float32 [N, B, Q], all on every device.

    Only the columns that are read reach the head, and the logits of one layer alone are in memory.
    """

    def columns(x_BTD):
        return jnp.take_along_axis(x_BTD, rows["columns"][..., None], axis=1)

    def lens(x_BMD):
        logits_BMV = model.logits(x_BMD)
        normalizers = jax.nn.logsumexp(logits_BMV, axis=-1)
        asked = jax.vmap(lambda logits, at, ids: logits[at, ids])(logits_BMV, rows["at"], rows["ids"])
        return asked - jnp.take_along_axis(normalizers, rows["at"], axis=1)

    inputs = Rows(rows["tokens"], rows["positions"], rows["branches"])
    states_NBMD = model.forward(inputs, cache=cache, collect=columns).collected
    return constrain(jax.lax.map(lens, states_NBMD[np.array(layers) - 1]))
