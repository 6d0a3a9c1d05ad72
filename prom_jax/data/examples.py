"""From sources to examples: what is asked, what is answered, and in which words.

An example has texts by stream, of which it may lack any: instruction pairs and translations have a *target*
and perhaps an *english* one, instruction pairs perhaps a *conversion* too, and rows of further streams one of
their own (see `Recipe`).
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from prom_jax.data import sources
from prom_jax.data import templates as prompts
from prom_jax.data.pairing import pair
from prom_jax.data.rows import Row, Sentence, Turn
from prom_jax.data.templates import Span, Wording
from prom_jax.utils.errors import UserError

LANGUAGES = ("english", "target")  # what a prompt may be worded in
PRIMARY, ENGLISH, CONVERSION = "target", "english", "conversion"
# What a text may be, besides one of a further stream, whose role has the stream's name.
ROLES = ("target", "english", "conversion", "translation", "translation_source", "text")
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

    `prompts` is the language of the template and the translation requests in the target texts: 'english', as
    in Alpaca and the published script, or 'target'.

    `holdout` pairs are taken off training; they have an English text, with an English prompt,
    wherever the source has, so that forgetting can be measured. `text` names aligned sentences that are
    kept plain, for held-out perplexity. `seed` chooses the held-out pairs and the translation wordings.
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

    def __post_init__(self):
        for name in ("prompts", "english_prompt"):
            if getattr(self, name) not in LANGUAGES:
                raise UserError(f"{name} is '{getattr(self, name)}': expected 'english' or 'target'.")
        if self.streams[:1] != (PRIMARY,) or len(set(self.streams)) < len(self.streams):
            raise UserError(f"streams are {self.streams}: expected different ones, the first '{PRIMARY}'.")
        if self.english and not self.target:
            raise UserError(
                f"English source '{self.english[0]}' has no target-language counterpart: set "
                "data.target too, or leave data.english empty."
            )
        if not (self.target or self.translation):
            raise UserError("There is nothing to train on: set data.target or data.translation.")

    def as_dict(self) -> dict:
        """What records depend on, for their fingerprint."""
        later = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("later")}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in later or value != later[name]
        }

    @property
    def words(self) -> Wording:
        """Of the prompts in the target texts."""
        return prompts.wording(self.language if self.prompts == "target" else "en")

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


@dataclass(frozen=True)
class Example:
    """An example before tokenisation: its texts by stream. `unusable` says why it is dropped, if it is.

    role: what it is: 'target' (an instruction pair), 'translation', 'text', or the name of a further stream.
    """

    id: str
    role: str
    texts: dict[str, list[Span]]
    unusable: str = ""


def role_in(stream: str, role: str) -> str:
    """The role under which a stream's text is counted of an example that is of a `role`."""
    if stream == ENGLISH:
        return "translation_source" if role == "translation" else "english"
    return stream if stream == CONVERSION else role


class Examples(NamedTuple):
    """The examples of each split ('train'; 'holdout' and 'text' where asked for), the number of instruction
    rows that found no partner, and what became of the rows of each source (`sources.Tally.as_dict`)."""

    splits: dict[str, list[Example]]
    unmatched: int
    rows: dict


def read_examples(recipe: Recipe) -> Examples:
    """The examples of a recipe.

    Raises:
      UserError: a bad source (see `sources`); a stream that none of the training examples has.
    """
    prompts.language_name(recipe.language)  # which refuses what is no language
    tally = sources.Tally(recipe.bad_rows)
    target = sources.read_instructions(recipe.target, recipe.language, tally)
    english = sources.read_instructions(recipe.english, "en", tally)
    sentences = sources.read_parallel(recipe.translation, recipe.language, tally)
    plain = sources.read_parallel(recipe.text, recipe.language, tally)
    more = {
        stream: sources.read_instructions(names, "en", tally) for stream, names in recipe.more_sources.items()
    }
    tally.check()
    pairs, unmatched = pair(english, target) if english else ([(None, t) for t in target], 0)
    held, kept = _split(len(pairs or sentences), recipe)
    if pairs:
        holdout = [_instruction(i, *pairs[i], recipe, held_out=True) for i in held]
        if recipe.shuffled:
            pairs = shuffle(pairs, kept, recipe.seed)
        train = [_instruction(i, *pairs[i], recipe) for i in kept]
        train += [_translation(i, s, recipe) for i, s in enumerate(sentences)]
    else:
        holdout = [_translation(i, sentences[i], recipe, held_out=True) for i in held]
        train = [_translation(i, sentences[i], recipe) for i in kept]
    for stream, rows in more.items():
        train += [_further(f"{stream}-{i}", stream, row) for i, row in enumerate(rows)]
    check_streams(recipe, {stream for example in train for stream in example.texts})
    text = [
        Example(f"text-{i}", "text", _texts(prompts.plain(s.target), prompts.plain(s.english)))
        for i, s in enumerate(plain)
    ]
    splits = {"train": train, "holdout": holdout, "text": text}
    found = {name: examples for name, examples in splits.items() if examples}
    return Examples(found, unmatched, tally.as_dict())


class NoStream(UserError):
    """The data have nothing of a stream that the method trains on."""


def check_streams(recipe: Recipe, found: set[str]) -> None:
    """Raises NoStream for a stream that the method trains on and that is not among those found."""
    for stream in recipe.streams:
        if stream not in found:
            english = "data.english, or use the variant :bactrian"
            known = {PRIMARY: "data.target", ENGLISH: english, CONVERSION: english}
            remedy = known.get(stream, f"data.streams={stream}=FILE")
            raise NoStream(
                f"The method trains on the stream '{stream}', and the data have none of it: set {remedy}."
            )


def _texts(target: list[Span], english: list[Span] | None) -> dict[str, list[Span]]:
    """By stream."""
    return {PRIMARY: target} | ({ENGLISH: english} if english else {})


def _further(name: str, stream: str, row: Row) -> Example:
    """A row of a further stream."""
    text = prompts.conversation(row.turns, prompts.wording("en"), system=row.system)
    return Example(row.id or name, stream, {stream: text})


def _split(number: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Indices of the held-out examples and of the others."""
    if recipe.holdout >= number:
        raise UserError(
            f"{recipe.holdout} held-out pairs were asked for and there are {number}: lower "
            "eval.holdout, so that some are left to train on."
        )
    order = np.random.default_rng([recipe.seed, number]).permutation(number).tolist()
    return sorted(order[: recipe.holdout]), sorted(order[recipe.holdout :])


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


def _instruction(index: int, english: Row | None, target: Row, recipe: Recipe, held_out=False):
    name = target.id or f"instruction-{index}"
    turns, words, system = (), prompts.wording("en"), ""
    if english and (ENGLISH in recipe.streams or held_out):
        turns, system = english.turns, english.system
        if recipe.english_prompt == "target" and not held_out:
            answers = [turn.output for turn in turns]
            turns, words = _asked_in_target(name, target.turns, answers), recipe.words
            system = target.system
    texts = _texts(
        prompts.conversation(target.turns, recipe.words, system=target.system),
        prompts.conversation(turns, words, system=system),
    )
    if english and CONVERSION in recipe.streams and not held_out:
        asked = ["\n\n".join(filter(None, (turn.instruction, turn.input))) for turn in english.turns]
        converted = _asked_in_target(name, target.turns, asked)
        texts[CONVERSION] = prompts.conversation(converted, recipe.words, False, target.system)
    return Example(id=name, role="target", texts=texts)


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
    rendered = (sentence.english, sentence.target, recipe.language, f"{recipe.seed}:{name}", recipe.words)
    has_source = held_out or (recipe.translation_source and ENGLISH in recipe.streams)
    source = prompts.translation_source(*rendered) if has_source else None
    return Example(
        id=name,
        role="translation",
        texts=_texts(prompts.translation(*rendered), source),
        unusable="" if sentence.english.strip() else "no source sentence",
    )
