"""From sources to examples: what is asked, what is answered, and in which words.

An example has texts by stream, of which it may lack any: instruction pairs and translations have a *target*
and perhaps an *english* one, instruction pairs perhaps a *conversion* too, and rows of further streams one of
their own (see `Recipe`).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from prom_jax.data import corpora, sources
from prom_jax.data import templates as prompts
from prom_jax.data.pairing import pair
from prom_jax.data.rows import Row, Sentence, Text, Turn
from prom_jax.data.templates import Dialogue, Plain
from prom_jax.utils.errors import UserError

LANGUAGES = ("english", "target")  # what a prompt may be worded in
PRIMARY, ENGLISH, CONVERSION = "target", "english", "conversion"
# What a text may be, besides one of a further stream, whose role has the stream's name.
ROLES = ("target", "english", "conversion", "translation", "translation_source", "text", "english_text")
SOURCES = ("target", "english", "translation", "text", "raw", "raw_english")  # the fields that name some
STREAM = re.compile(r"[a-z][a-z0-9_]*")  # a name


def _later(default) -> Any:
    """A setting of a recipe that there was not from the start: at its default records are what they were, and
    so is their fingerprint."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the examples, but for what the sources hold.

    `streams` are what the method trains on, the primary one, 'target', first. Instruction pairs: the target
    text is the target-language example, the English one its counterpart, with a prompt in English or, with
    `english_prompt='target'`, the target's prompt before the English response. The conversion text is the
    target's prompt with the English prompt in the place of the response. With `shuffled` the English rows of
    training pairs are dealt out anew (`shuffle`). Translations: the target text asks for the target sentence;
    with `translation_source` the English text is the same up to the end of the English sentence, which has
    the loss. `more` has (stream, sources) of further streams: instruction rows with the English template,
    each an example of that stream alone. Only what `streams` name is made.

    `template` is what texts are put into: 'alpaca', or 'model' for the chat template of the tokenizer.
    `prompts` is the language of the template and the translation requests in the target texts: 'english', as
    in Alpaca and the published script, or 'target'.

    `holdout` pairs are taken off training; they have an English text, with an English prompt,
    wherever the source has, so that forgetting can be measured. `text` names aligned sentences that are
    kept plain, for held-out perplexity. `seed` chooses the held-out pairs and the translation wordings.
    `pairing` says which instruction rows are counterparts (`pairing.pair`); one without is an example of its
    own stream alone. `raw` and `raw_english` name raw text, each text an example of the target and of the
    English stream; a long one continues in further examples.
    `too_long` says what becomes of a text of more than `seq_len` tokens: 'cut', 'drop' or 'refuse'.
    `bad_rows` says whether a row that cannot be used ends all ('refuse') or is left out ('skip').
    """

    language: str
    target: tuple[str, ...] = ()
    english: tuple[str, ...] = ()
    translation: tuple[str, ...] = ()
    seq_len: int = 2048
    prompts: str = "english"
    english_prompt: str = "english"
    translation_source: bool = False
    streams: tuple[str, ...] = (PRIMARY, ENGLISH)
    more: tuple[tuple[str, tuple[str, ...]], ...] = ()
    holdout: int = 0
    text: tuple[str, ...] = ()
    seed: int = 0
    shuffled: bool = False
    bad_rows: str = _later("refuse")
    template: str = _later("alpaca")
    pairing: str = _later("id")
    too_long: str = _later("cut")
    raw: tuple[str, ...] = _later(())
    raw_english: tuple[str, ...] = _later(())

    def __post_init__(self):
        for name in ("prompts", "english_prompt"):
            if getattr(self, name) not in LANGUAGES:
                raise UserError(f"{name} is '{getattr(self, name)}': expected 'english' or 'target'.")
        if self.streams[:1] != (PRIMARY,) or len(set(self.streams)) < len(self.streams):
            raise UserError(f"streams are {self.streams}: expected different ones, the first '{PRIMARY}'.")
        if not (self.target or self.translation or self.raw):
            raise UserError("There is nothing to train on: set data.target, data.translation or data.text.")
        if {source.partition("?")[0] for source in self.translation} & set(corpora.EVALUATION):
            raise UserError("data.translation names FLORES-200's devtest, which is for eval.text alone.")

    def as_dict(self) -> dict:
        """What records depend on, for their fingerprint; of sources how they are read (`sources.manner`), as
        files may move."""
        later = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("later")}

        def manners(names):
            return [sources.manner(name, self.language) for name in names]

        found = dataclasses.asdict(self) | {"more": [(stream, manners(names)) for stream, names in self.more]}
        found |= {name: manners(getattr(self, name)) for name in SOURCES}
        return {
            name: value
            for name, value in found.items()
            if name not in later or getattr(self, name) != later[name]
        }

    @property
    def words(self) -> str:
        """The language of the prompts in the target texts."""
        return self.language if self.prompts == "target" else "en"

    @property
    def more_sources(self) -> dict[str, tuple[str, ...]]:
        """Sources of the further streams that the method trains on."""
        return {stream: names for stream, names in self.more if stream in self.streams}


def further_streams(entries: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Recipe.more` from entries 'stream=source'; a stream may have several.

    Raises:
      UserError: an entry that is not so, or a stream that other keys make.
    """
    more: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        stream, _, source = entry.partition("=")
        if not (STREAM.fullmatch(stream) and source):
            raise UserError(
                f"data.streams has '{entry}': expected 'name=source', such as 'replay=rows.jsonl', with a "
                "name of small letters, digits and underscores."
            )
        if stream in ROLES:
            raise UserError(f"data.streams has '{entry}': '{stream}' is taken, give another name.")
        more[stream] = (*more.get(stream, ()), source)
    return tuple(more.items())


@dataclass(frozen=True, slots=True)
class Example:
    """An example before it is put into a template: its texts by stream. `unusable` says why it is dropped, if
    it is; `repeat` how often an epoch has it.

    role: what it is: 'target' (an instruction pair, or its target side), 'english' (an English side alone),
      'translation', 'text', 'english_text', or the name of a further stream.
    """

    id: str
    role: str
    texts: dict[str, Dialogue | Plain]
    unusable: str = ""
    repeat: int = 1


def role_in(stream: str, role: str) -> str:
    """The role under which a stream's text is counted of an example that is of a `role`."""
    if stream == ENGLISH and role != "english_text":
        return "translation_source" if role == "translation" else "english"
    return stream if stream == CONVERSION else role


class Examples(NamedTuple):
    """The examples of each split ('train'; 'holdout' and 'text' where asked for), the number of instruction
    rows that found no partner, and what became of the rows of each source (`sources.Tally.as_dict`)."""

    splits: dict[str, "Made | list[Example]"]
    unmatched: int
    rows: dict


def read_examples(recipe: Recipe, usable: Callable[[Example], bool] = lambda example: True) -> Examples:
    """The examples of a recipe.

    Args:
      usable: whether something is left of an example's target text when it is tokenised; others are not held
        out.

    Raises:
      UserError: a bad source (see `sources`); a stream that none of the training examples has.
    """
    prompts.language_name(recipe.language)  # which refuses what is no language
    tally = sources.Tally(recipe.bad_rows)
    target = sources.read_instructions(recipe.target, recipe.language, tally)
    english = sources.read_instructions(recipe.english, "en", tally)
    sentences = sources.read_parallel(recipe.translation, recipe.language, tally)
    texts = sources.read_texts(recipe.raw, tally)
    aligned = sources.read_parallel(recipe.text, recipe.language, tally)
    raw_english = sources.read_texts(recipe.raw_english if ENGLISH in recipe.streams else (), tally)
    more = {name: sources.read_instructions(of, "en", tally) for name, of in recipe.more_sources.items()}
    tally.check()
    pairs, lone_english, lone_target = pair(english, target, recipe.pairing)
    unmatched = len(lone_english) + len(lone_target) if english else 0
    if english and not pairs:
        _check_pairs_not_needed(recipe, english, target)
    if not english:
        pairs, lone_target = [(None, row) for row in target], []
    train, holdout = _split(recipe, pairs, sentences, texts, usable, has_rows=bool(target))
    train.add(lone_target, lambda i, row: _instruction(len(pairs) + i, (None, row), recipe))
    if ENGLISH in recipe.streams:
        train.add(lone_english, lambda i, row: _english(i, row, recipe))
        train.add(raw_english, _english_text)
    for stream, rows in more.items():
        train.add(rows, functools.partial(_further, stream))
    check_streams(recipe, _streams(train, set(recipe.streams)))
    text = Made()
    text.add(aligned, lambda i, s: Example(f"text-{i}", "text", _texts(Plain(s.target), Plain(s.english))))
    splits: dict[str, Made | list[Example]] = {"train": train, "holdout": holdout, "text": text}
    found = {name: examples for name, examples in splits.items() if len(examples)}
    return Examples(found, unmatched, tally.as_dict())


class Made(Sized, Iterable):
    """Examples that are made of their rows each time that they are gone through, as there may be millions."""

    def __init__(self):
        self._groups: list[tuple[list, Callable[[int, Any], Example], Sequence[int]]] = []

    def add(
        self, rows: list, make: Callable[[int, Any], Example], indices: Sequence[int] | None = None
    ) -> None:
        """Appends what `make` gives of a row's index and the row: of all rows, or of some indices."""
        self._groups.append((rows, make, range(len(rows)) if indices is None else indices))

    def __len__(self) -> int:
        return sum(len(indices) for _, _, indices in self._groups)

    def __iter__(self) -> Iterator[Example]:
        for rows, make, indices in self._groups:
            yield from (make(i, rows[i]) for i in indices)


def _streams(examples: Iterable[Example], wanted: set[str]) -> set[str]:
    """The streams that examples have; all are gone through only where one that is wanted is missing."""
    found: set[str] = set()
    for example in examples:
        found |= example.texts.keys()
        if found >= wanted:
            break
    return found


def _split(
    recipe: Recipe, pairs: list, sentences: list, texts: list, usable: Callable, has_rows: bool
) -> tuple[Made, list[Example]]:
    """Examples to train on, and held out: of the pairs where there are instruction rows, else of the
    sentences, or of raw text."""
    groups: list[tuple[Callable[..., Example], list]] = [
        (_instruction, pairs),
        (_translation, sentences),
        (_raw_text, texts),
    ]
    of = 0 if has_rows else next((i for i, (_, rows) in enumerate(groups) if rows), 0)
    make, rows = groups[of]
    holdout = _hold_out(lambda i: make(i, rows[i], recipe, held_out=True), len(rows), recipe, usable)
    kept = [i for i in range(len(rows)) if i not in holdout]
    if recipe.shuffled:
        groups[0] = _instruction, shuffle(pairs, kept if of == 0 else [], recipe.seed)
    train = Made()
    for number, (make, rows) in enumerate(groups):
        train.add(rows, functools.partial(make, recipe=recipe), kept if number == of else None)
    return train, list(holdout.values())


def _check_pairs_not_needed(recipe: Recipe, english: list[Row], target: list[Row]) -> None:
    """Raises UserError for settings that ask for pairs, of rows that have no counterparts."""
    ids = ", ".join(f"such as '{rows[0].id}'" for rows in (english, target) if rows)
    none = f"and no English row has a target counterpart ({ids}): give counterparts the same id, or set"
    if recipe.english_prompt == "target" and ENGLISH in recipe.streams:
        raise UserError(f"pivot.english_prompt=target asks for pairs, {none} it to english.")
    if recipe.holdout:
        raise UserError(f"eval.holdout={recipe.holdout} asks for pairs, {none} it to 0.")


class NoStream(UserError):
    """The data have nothing of a stream that the method trains on."""


def check_streams(recipe: Recipe, found: set[str]) -> None:
    """Raises NoStream for a stream that the method trains on and that is not among those found."""
    for stream in recipe.streams:
        if stream not in found:
            english = "data.english, or use the variant :bactrian"
            known = {
                PRIMARY: "data.target, data.translation or data.text",
                ENGLISH: english,
                CONVERSION: english,
            }
            remedy = known.get(stream, f"data.streams={stream}=FILE")
            raise NoStream(
                f"The method trains on the stream '{stream}', and the data have none of it: set {remedy}."
            )


def _texts(target: Dialogue | Plain, english: Dialogue | Plain | None) -> dict[str, Dialogue | Plain]:
    """By stream."""
    return {PRIMARY: target} | ({ENGLISH: english} if english else {})


def _english(index: int, row: Row, recipe: Recipe) -> Example:
    """An English row without a counterpart."""
    unusable = "no counterpart, whose prompt it is to follow" if recipe.english_prompt == "target" else ""
    dialogue = Dialogue(row.turns, system=row.system)
    return Example(row.id or f"english-{index}", "english", {ENGLISH: dialogue}, unusable, row.repeat)


def _raw_text(index: int, text: Text, recipe: Recipe, held_out=False) -> Example:
    plain = Plain(text.text, continues=not held_out)
    return Example(text.id or f"text-{index}", "text", {PRIMARY: plain}, repeat=text.repeat)


def _english_text(index: int, text: Text) -> Example:
    plain = Plain(text.text, continues=True)
    return Example(text.id or f"english_text-{index}", "english_text", {ENGLISH: plain}, repeat=text.repeat)


def _further(stream: str, index: int, row: Row) -> Example:
    """A row of a further stream."""
    dialogue = Dialogue(row.turns, system=row.system)
    return Example(row.id or f"{stream}-{index}", stream, {stream: dialogue}, repeat=row.repeat)


def _hold_out(make: Callable, number: int, recipe: Recipe, usable: Callable) -> dict[int, Example]:
    """The examples that are held out of this number of them, by index: the first in the seed's order that can
    be used.

    Args:
      make: gives the example of an index, as it is held out.
    """
    order = np.random.default_rng([recipe.seed, number]).permutation(number).tolist()
    found = ((i, example) for i, example in ((i, make(i)) for i in order) if usable(example))
    held = dict(sorted(itertools.islice(found, recipe.holdout)))
    if recipe.holdout and (len(held) < recipe.holdout or recipe.holdout == number):
        can_be_used = f", of which {len(held)} keep an answer at data.seq_len={recipe.seq_len}"
        can_be_used *= len(held) < number
        raise UserError(
            f"{recipe.holdout} held-out pairs were asked for and there are {number}{can_be_used}: lower "
            "eval.holdout, so that some are left to train on."
        )
    return held


def shuffle(pairs: list, kept: list[int], seed: int) -> list:
    """The pairs, in which each of some has the English row of another one of them.

    Args:
      pairs: (English row, target row).
      kept: indices of the pairs that change.
      seed: chooses the order.
    """
    order = np.random.default_rng([seed, len(kept), 1]).permutation(kept).tolist()
    english = {i: pairs[j][0] for i, j in zip(order, order[1:] + order[:1])}  # no row stays with its own
    return [(english.get(i, pair[0]), pair[1]) for i, pair in enumerate(pairs)]


def _instruction(index: int, pair: tuple[Row | None, Row], recipe: Recipe, held_out=False) -> Example:
    english, target = pair
    name = target.id or f"instruction-{index}"
    answered = None
    if english and (ENGLISH in recipe.streams or held_out):
        answered = Dialogue(english.turns, system=english.system)
        if recipe.english_prompt == "target" and not held_out:
            turns = _asked_in_target(name, target.turns, [turn.output for turn in english.turns])
            answered = Dialogue(turns, recipe.words, target.system)
    texts = _texts(Dialogue(target.turns, recipe.words, target.system), answered)
    if english and CONVERSION in recipe.streams and not held_out:
        asked = ["\n\n".join(filter(None, (turn.instruction, turn.input))) for turn in english.turns]
        converted = _asked_in_target(name, target.turns, asked)
        texts[CONVERSION] = Dialogue(converted, recipe.words, target.system, ended=False)
    repeat = max(row.repeat for row in pair if row)
    return Example(id=name, role="target", texts=texts, repeat=repeat)


def _asked_in_target(name: str, target: tuple[Turn, ...], answers: list[str]) -> tuple[Turn, ...]:
    """The target's turns with English answers."""
    if len(answers) != len(target):
        raise UserError(
            f"Row '{name}' has {len(answers)} English and {len(target)} target turns: English after a target "
            "prompt (english_prompt='target', method='deep_supervision') needs as many on both sides."
        )
    return tuple(
        dataclasses.replace(asked, output=answer) for asked, answer in zip(target, answers, strict=True)
    )


def _translation(index: int, sentence: Sentence, recipe: Recipe, held_out=False) -> Example:
    name = sentence.id or f"translation-{index}"
    request = prompts.translation(
        sentence.english, sentence.target, recipe.language, f"{recipe.seed}:{name}", recipe.words
    )
    has_source = held_out or (recipe.translation_source and ENGLISH in recipe.streams)
    source = dataclasses.replace(request, learns="input") if has_source else None
    return Example(
        id=name,
        role="translation",
        texts=_texts(request, source),
        unusable="" if sentence.english.strip() else "no source sentence",
        repeat=sentence.repeat,
    )
