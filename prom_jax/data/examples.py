"""From sources to examples: what is asked, what is answered, and in which words.

An example has a *target* side and perhaps an *English* side (see `Recipe`).
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from prom_jax.data import sources
from prom_jax.data import templates as prompts
from prom_jax.data.sources import Row, Sentence, Turn
from prom_jax.data.templates import Span, Wording
from prom_jax.utils.errors import UserError

LANGUAGES = ("english", "target")  # what a prompt may be worded in


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the examples, but for what the sources hold.

    Instruction pairs: the target side is the target-language example, the English side the
    English one, its prompt in English or, with `english_prompt='target'`, the target's prompt
    before the English response. Translations: the target side asks for the target sentence; with
    `translation_source` the English side is the same text up to the end of the English sentence,
    which bears the loss. Without `use_english` no English side is made. `prompts` is the language
    of the template and the translation requests on the target side: 'english', as in Alpaca and
    the published script, or 'target'.

    `holdout` pairs are taken off training; they have an English side, with an English prompt,
    wherever the source has, so that forgetting can be measured. `text` names aligned sentences that are
    kept plain, for held-out perplexity. `seed` chooses the held-out pairs and the translation wordings.
    """

    language: str
    target: tuple[str, ...] = ()
    english: tuple[str, ...] = ()
    translation: tuple[str, ...] = ()
    seq_len: int = 2048
    prompts: str = "english"
    english_prompt: str = "english"
    translation_source: bool = False
    use_english: bool = True
    holdout: int = 0
    text: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("prompts", "english_prompt"):
            if getattr(self, name) not in LANGUAGES:
                raise UserError(f"{name} is '{getattr(self, name)}': expected 'english' or 'target'.")
        if self.english and not self.target:
            raise UserError(
                f"English source '{self.english[0]}' has no target-language counterpart: set "
                "data.target too, or leave data.english empty."
            )
        if not (self.target or self.translation):
            raise UserError("There is nothing to train on: set data.target or data.translation.")

    @property
    def words(self) -> Wording:
        """Of the prompts on the target side."""
        return prompts.wording(self.language if self.prompts == "target" else "en")


@dataclass(frozen=True)
class Example:
    """An example before tokenisation; its sides are counted under their roles. `unusable` says why it is
    dropped, if it is."""

    id: str
    role: str
    target: list[Span]
    english: list[Span] | None = None
    english_role: str = "english"
    unusable: str = ""


def read_examples(recipe: Recipe) -> tuple[dict[str, list[Example]], int]:
    """The examples of each split ('train'; 'holdout' and 'text' where asked for), and the number
    of instruction rows that found no partner."""
    prompts.language_name(recipe.language)  # which refuses what is no language
    target = sources.read_instructions(recipe.target, recipe.language)
    english = sources.read_instructions(recipe.english, "en")
    pairs, unmatched = sources.pair(english, target) if english else ([(None, t) for t in target], 0)
    sentences = sources.read_parallel(recipe.translation, recipe.language)
    held, kept = _split(len(pairs or sentences), recipe)
    if pairs:
        holdout = [_instruction(i, *pairs[i], recipe, held_out=True) for i in held]
        train = [_instruction(i, *pairs[i], recipe) for i in kept]
        train += [_translation(i, s, recipe) for i, s in enumerate(sentences)]
    else:
        holdout = [_translation(i, sentences[i], recipe, held_out=True) for i in held]
        train = [_translation(i, sentences[i], recipe) for i in kept]
    text = [
        Example(f"text-{i}", "text", prompts.plain(s.target), prompts.plain(s.english))
        for i, s in enumerate(sources.read_parallel(recipe.text, recipe.language))
    ]
    splits = {"train": train, "holdout": holdout, "text": text}
    return {name: examples for name, examples in splits.items() if examples}, unmatched


def _split(number: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Indices of the held-out examples and of the others."""
    if recipe.holdout >= number:
        raise UserError(
            f"{recipe.holdout} held-out pairs were asked for and there are {number}: lower "
            "eval.holdout, so that some are left to train on."
        )
    order = np.random.default_rng([recipe.seed, number]).permutation(number).tolist()
    return sorted(order[: recipe.holdout]), sorted(order[recipe.holdout :])


def _instruction(index: int, english: Row | None, target: Row, recipe: Recipe, held_out=False):
    name = target.id or f"instruction-{index}"
    turns, words = None, prompts.wording("en")
    if english and (recipe.use_english or held_out):
        turns = english.turns
        if recipe.english_prompt == "target" and not held_out:
            turns, words = _asked_in_target(name, turns, target.turns), recipe.words
    return Example(
        id=name,
        role="target",
        target=prompts.conversation(target.turns, recipe.words),
        english=turns and prompts.conversation(turns, words),
    )


def _asked_in_target(name: str, english: tuple[Turn, ...], target: tuple[Turn, ...]):
    if len(english) != len(target):
        raise UserError(
            f"Row '{name}' has {len(english)} English and {len(target)} target turns: "
            "english_prompt='target' needs as many on both sides."
        )
    return tuple(
        dataclasses.replace(asked, output=answered.output)
        for asked, answered in zip(target, english, strict=True)
    )


def _translation(index: int, sentence: Sentence, recipe: Recipe, held_out=False) -> Example:
    name = sentence.id or f"translation-{index}"
    rendered = (sentence.english, sentence.target, recipe.language, f"{recipe.seed}:{name}", recipe.words)
    source = recipe.translation_source and recipe.use_english
    return Example(
        id=name,
        role="translation",
        target=prompts.translation(*rendered),
        english=prompts.translation_source(*rendered) if source or held_out else None,
        english_role="translation_source",
        unusable="" if sentence.english.strip() else "no source sentence",
    )
