"""Tokenised examples on disk: TFDS ArrayRecord files in a folder named by what determines them.

An example has a *target* side and perhaps an *English* side (see `Recipe`); a side is its tokens
and a mask of those that bear loss.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from prom_jax.console import track
from prom_jax.data import prompts, sources
from prom_jax.data.prompts import Span
from prom_jax.data.sources import Row, Sentence, Turn
from prom_jax.data.tokens import Side, encode
from prom_jax.errors import UserError
from prom_jax.workdir import make_directory

VERSION = 1  # part of the fingerprint: raise it whenever the same recipe gives other records
CHUNK = 512  # examples tokenised at once
STATISTICS = tuple(
    f"{side}_{what}" for side in ("target", "english") for what in ("lengths", "weights", "bytes")
)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the records, but for the tokenizer and what the sources hold.

    Instruction pairs: the target side is the target-language example, the English side the
    English one, its prompt in English or, with `english_prompt='target'`, the target's prompt
    before the English response. Translations: the target side asks in English for the target
    sentence; with `translation_source` the English side is the same text up to the end of the
    English sentence, which bears the loss. Without `use_english` no English side is made.

    `holdout` pairs are taken off training; they always have an English side, with an English
    prompt, so that forgetting can be measured. `text` names aligned sentences that are kept plain,
    for held-out perplexity. `seed` chooses the held-out pairs and the translation wordings.
    """

    language: str
    target: tuple[str, ...] = ()
    english: tuple[str, ...] = ()
    translation: tuple[str, ...] = ()
    seq_len: int = 2048
    english_prompt: str = "english"
    translation_source: bool = False
    use_english: bool = True
    holdout: int = 0
    text: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.english_prompt not in ("english", "target"):
            raise UserError(f"english_prompt is '{self.english_prompt}': expected 'english' or 'target'.")
        if self.english and not self.target:
            raise UserError(
                f"English source '{self.english[0]}' has no target-language counterpart: set "
                "data.target too, or leave data.english empty."
            )
        if not (self.target or self.translation):
            raise UserError("There is nothing to train on: set data.target or data.translation.")


# Examples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An example before tokenisation; its sides are counted under their roles."""

    id: str
    role: str
    target: list[Span]
    english: list[Span] | None = None
    english_role: str = "english"


def _examples(recipe: Recipe) -> tuple[dict[str, list[Example]], int]:
    """The examples of each split ('train'; 'holdout' and 'text' where asked for), and the number
    of instruction rows that found no partner."""
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
    turns = None
    if english and (recipe.use_english or held_out):
        turns = english.turns
        if recipe.english_prompt == "target" and not held_out:
            turns = _asked_in_target(name, turns, target.turns)
    return Example(
        id=name,
        role="target",
        target=prompts.conversation(target.turns),
        english=turns and prompts.conversation(turns),
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
    rendered = (sentence.english, sentence.target, recipe.language, f"{recipe.seed}:{name}")
    source = recipe.translation_source and recipe.use_english
    return Example(
        id=name,
        role="translation",
        target=prompts.translation(*rendered),
        english=prompts.translation_source(*rendered) if source or held_out else None,
        english_role="translation_source",
    )


# Records --------------------------------------------------------------------------------------


class Records:
    """The examples of one split, read at random.

    `records[i]` is {"id": str, "target_tokens": int32 [T], "target_loss": bool [T],
    "english_tokens", "english_loss"}; the English arrays are empty where there is no English side.

    Attributes (int64 arrays, one entry an example):
      target_lengths, english_lengths: tokens; 0 where there is no English side.
      target_weights, english_weights: tokens that bear loss.
      target_bytes, english_bytes: UTF-8 bytes under them, EOS not counted (for bits per byte).
    """

    def __init__(self, directory: Path, split: str):
        self._source = tfds.builder_from_directory(str(directory)).as_data_source(split)
        with np.load(directory / f"{split}.npz") as statistics:
            for name in STATISTICS:
                setattr(self, name, statistics[name])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self.read([index])[0]

    def read(self, indices) -> list[dict]:
        """Several examples at once, which is faster than one by one."""
        return [
            {
                key: value.decode() if key == "id" else value.astype(bool) if "loss" in key else value
                for key, value in example.items()
            }
            for example in self._source.__getitems__(list(map(int, indices)))
        ]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: training records, the held-out pairs and plain texts (None where not
    asked for), and the report: {"unmatched": rows, split: {role: {"examples", "tokens", "loss_tokens",
    "truncated", "dropped"}}}, the roles being target, english, translation, translation_source and text.
    """

    fingerprint: str
    train: Records
    holdout: Records | None
    text: Records | None
    report: dict


def prepare(recipe: Recipe, tokenizer, directory) -> Prepared:
    """Records for `recipe` in a folder of `directory` named by their fingerprint; made if missing.

    Writing is atomic, so that an interrupted or a concurrent call does no harm.

    Raises:
      UserError: a bad source (see `sources`); a tokenizer without EOS or offsets; more held-out
        pairs than pairs; nothing left to train on after truncation.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(
            f"Tokenizer '{tokenizer.name_or_path}' has no EOS token or no character offsets: give "
            "a fast tokenizer (tokenizer.json) that names its eos_token."
        )
    directory = Path(directory)
    final = directory / fingerprint(recipe, tokenizer)
    if not final.is_dir():
        make_directory(directory)
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=directory))
        try:
            _write(recipe, tokenizer, partial)
            os.rename(partial, final)
        except OSError:
            if not final.is_dir():  # else another process was faster, with the same records
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    report = json.loads((final / "report.json").read_text())
    splits = {
        name: Records(final, name) if (final / f"{name}.npz").is_file() else None
        for name in ("train", "holdout", "text")
    }
    return Prepared(final.name, **splits, report=report)


def fingerprint(recipe: Recipe, tokenizer) -> str:
    """16 hexadecimal digits: recipe, contents of its sources, tokenizer, version of the code."""
    used = [(name, recipe.language) for name in recipe.target + recipe.translation + recipe.text]
    used += [(name, "en") for name in recipe.english]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding"), state.pop("truncation")  # set by calls, not part of the vocabulary
    parts = {
        "versions": [VERSION, prompts.VERSION],
        "recipe": dataclasses.asdict(recipe),
        "sources": [sources.fingerprint(*source) for source in used],
        "tokenizer": [state, tokenizer.bos_token_id, tokenizer.eos_token_id],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(recipe: Recipe, tokenizer, directory: Path) -> None:
    splits, unmatched = _examples(recipe)
    writer = _writer(directory)
    writer.initialize_splits(list(splits))
    report = {"unmatched": unmatched}
    for name, examples in splits.items():
        report[name], statistics = {}, []
        for first in track(range(0, len(examples), CHUNK), f"tokenising {name}"):
            chunk = examples[first : first + CHUNK]
            records = list(_tokenise(chunk, tokenizer, recipe.seq_len, report[name]))
            statistics += [_statistics(target, english) for _, target, english in records]
            writer.add_examples({name: [_record(*record) for record in records]})
        if not statistics:
            raise UserError(
                f"Nothing is left of the {len(examples)} examples for {name} when cut at "
                f"data.seq_len = {recipe.seq_len}: raise it, or give examples that have a response."
            )
        columns = np.array(statistics, np.int64).T
        np.savez(directory / f"{name}.npz", **dict(zip(STATISTICS, columns, strict=True)))
    writer.close_all()
    (directory / "report.json").write_text(json.dumps(report, indent=2))


def _writer(directory: Path) -> tfds.core.SequentialWriter:
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    loss = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
    features = {
        "id": tfds.features.Text(),
        "target_tokens": tokens,
        "target_loss": loss,
        "english_tokens": tokens,
        "english_loss": loss,
    }
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="prom",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    return tfds.core.SequentialWriter(info, 1 << 20, file_format="array_record")


def _tokenise(examples: list[Example], tokenizer, seq_len: int, report: dict) -> Iterator[tuple]:
    """(id, target side, English side or None) of each example that keeps something to learn."""
    targets = encode(tokenizer, [example.target for example in examples], seq_len)
    asked = [example.english for example in examples if example.english]
    english = iter(encode(tokenizer, asked, seq_len) if asked else ())
    for example, target in zip(examples, targets, strict=True):
        other = next(english) if example.english else None
        learns = _count(report, example.role, target)
        learns_english = other and _count(report, example.english_role, other, with_target=learns)
        if learns:
            yield example.id, target, other if learns_english else None


def _count(report: dict, role: str, side: Side, with_target: bool = True) -> bool:
    """Enter `side` in the report; whether it is kept: it has text to learn, and its target too."""
    counts = report.setdefault(
        role, {"examples": 0, "tokens": 0, "loss_tokens": 0, "truncated": 0, "dropped": 0}
    )
    kept = with_target and side.bytes > 0
    counts["dropped"] += not kept
    if kept:
        counts["examples"] += 1
        counts["tokens"] += len(side.tokens)
        counts["loss_tokens"] += int(side.loss.sum())
        counts["truncated"] += side.truncated
    return kept


def _statistics(*sides: Side | None) -> list[int]:
    """In the order of STATISTICS."""
    return [
        number
        for side in sides
        for number in ((len(side.tokens), side.loss.sum(), side.bytes) if side else (0, 0, 0))
    ]


def _record(name: str, target: Side, english: Side | None) -> dict:
    record = {"id": name, "target_tokens": target.tokens, "target_loss": target.loss}
    record["english_tokens"] = english.tokens if english else np.zeros(0, np.int32)
    record["english_loss"] = english.loss if english else np.zeros(0, np.uint8)
    return record | {key: record[key].astype(np.uint8) for key in ("target_loss", "english_loss")}
