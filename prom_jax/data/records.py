"""Tokenised examples on disk: TFDS ArrayRecord files in a folder named by what determines them.

An example's text in a stream (see `examples`) is its tokens and a mask of those that have a loss.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.json_format import MessageToDict

from prom_jax.data import quality, shards, sources
from prom_jax.data import templates as prompts
from prom_jax.data.chat_templates import own_template
from prom_jax.data.encoding import Encoder, check_lengths, summed
from prom_jax.data.examples import Recipe, check_streams, read_examples
from prom_jax.tokenization import folder as tokenizers
from prom_jax.utils.console import track
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.workdir import make_directory

with needs("data"):
    import tensorflow_datasets as tfds

VERSION = 4  # part of the fingerprint: raise it whenever the same recipe gives other records


class Stream(NamedTuple):
    """What is known of one stream's texts without reading them: int64 arrays [examples], but for the last.

    lengths: tokens; 0 where an example lacks the stream.
    weights: tokens that have a loss.
    bytes: UTF-8 bytes under them, EOS not counted (for bits per byte).
    prefix_ids: of the prefix that a text shares with others (see `shared_prefixes`); -1 where it shares none.
    prefix_lengths: tokens of each prefix, none with a loss, int64 [prefixes].
    """

    lengths: np.ndarray
    weights: np.ndarray
    bytes: np.ndarray
    prefix_ids: np.ndarray
    prefix_lengths: np.ndarray


class Records:
    """The examples of one split, read at random.

    `records[i]` is {"id": str, "<stream>_tokens": int32 [T], "<stream>_loss": bool [T]} with both arrays for
    every stream; empty where the example lacks it.

    Attributes:
      names: of the streams, the primary one first.
      streams: {stream: Stream}, in the order of the names.
      roles: what each example is, str [examples] (see `examples.Example`).
      repeats: how often an epoch has each, int64 [examples].
      common_prompts: by secondary stream, int64 [examples], tokens without loss with which an example's text
        begins as its primary text does.

    Raises:
      UserError: the files are not as `prepare` made them.
    """

    def __init__(self, directory: Path, split: str):
        self._directory = directory
        with _naming_damage(directory):
            with np.load(directory / f"{split}.npz") as statistics:
                self.names: tuple[str, ...] = tuple(statistics["names"].tolist())
                self.streams = {
                    name: Stream(*(statistics[f"{name}.{field}"] for field in Stream._fields))
                    for name in self.names
                }
                self.roles = statistics["role_names"][statistics["roles"]]
                once = np.ones(len(self.roles), np.int64)
                self.repeats = statistics.get("repeats", once)
                self.common_prompts = {name: statistics[f"{name}.common_prompts"] for name in self.names[1:]}
            _check_metadata(directory, self.names)
            self._source = tfds.builder_from_directory(str(directory)).as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    languages: tuple[str, ...] = ()  # this and `groups` as of a `mixture.Mixture`

    @property
    def groups(self) -> np.ndarray:
        """Zeros, int64 [examples]."""
        return np.zeros(len(self), np.int64)

    def __getitem__(self, index: int) -> dict:
        return self.read([index])[0]

    def read(self, indices) -> list[dict]:
        """Several examples at once, which is faster than one by one.

        Raises:
          UserError: the file of records is cut or changed.
        """
        with _naming_damage(self._directory):
            return [_arrays(example) for example in self._source.__getitems__(list(map(int, indices)))]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: training records, the held-out pairs and plain texts (None where not
    asked for), and the report: {"unmatched": rows, "rows": what became of those of
    each source, "checks": as `quality.Look` gives them, split: {role: counts}}, the roles being those of
    `examples.role_in` and the counts "examples", "tokens", "loss_tokens", "bytes" and "words" (of the text
    that has a loss), "text_tokens" (loss tokens without EOS), "truncated", "dropped" and "reasons"
    ({why: dropped}).
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
        pairs than pairs; nothing left to train on after truncation, in all or of a stream.
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
        try:
            partial = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=directory))
        except OSError as error:
            raise UserError(
                f"{directory} cannot be written into ({error.strerror}): give another place."
            ) from error
        try:
            _write(recipe, tokenizer, partial)
            partial.chmod(0o755)  # of a folder like others: a temporary one is its owner's alone
            os.rename(partial, final)
        except (OSError, RuntimeError) as error:  # the latter from ArrayRecord
            if not final.is_dir():  # else another process was faster, with the same records
                raise UserError(
                    f"The records cannot be written into {directory} ({error}): free some space."
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with _naming_damage(final):
        report = json.loads((final / "report.json").read_text())
    more = {name: Records(final, name) for name in ("holdout", "text") if (final / f"{name}.npz").is_file()}
    return Prepared(final.name, Records(final, "train"), more.get("holdout"), more.get("text"), report)


def fingerprint(recipe: Recipe, tokenizer) -> str:
    """16 hexadecimal digits: recipe, contents of its sources, tokenizer, version of the code."""
    used = [(name, recipe.language) for name in recipe.target + recipe.translation + recipe.text]
    used += [(name, "en") for name in itertools.chain(recipe.english, *recipe.more_sources.values())]
    used += [(name, recipe.language) for name in recipe.raw] + [(name, "en") for name in recipe.raw_english]
    parts = {
        "versions": [VERSION, prompts.VERSION],
        "recipe": recipe.as_dict(),
        "words": [dataclasses.asdict(prompts.wording(words)) for words in (recipe.words, "en")],
        "sources": [sources.fingerprint(*source) for source in used],
        "tokenizer": tokenizers.fingerprint(tokenizer),
    }
    if recipe.template != "alpaca":
        parts["template"] = own_template(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(recipe: Recipe, tokenizer, directory: Path) -> None:
    splits, unmatched, rows = read_examples(recipe, Encoder.of(recipe, tokenizer).can_use)
    # Only these two have streams that the method does not train on.
    found = {s for name in ("holdout", "text") for e in splits.get(name, ()) for s in e.texts}
    names = recipe.streams + tuple(sorted(found - set(recipe.streams)))
    report: dict[str, Any] = {"unmatched": unmatched, "rows": rows}
    look = quality.Look(recipe, list(splits.get("holdout", ())))
    infos = []
    with shards.writers(sum(map(len, splits.values())), tokenizer, recipe, names) as write:
        for split, examples in splits.items():
            seen = map(look.at, examples) if split == "train" else iter(examples)
            number = -(-len(examples) // shards.SHARD)
            paths = (directory / f"{split}-{i}.partial" for i in range(number))
            tasks = ((path, list(itertools.islice(seen, shards.SHARD))) for path in paths)
            made = list(track(write(tasks), f"tokenising {split}", number))
            kept = [shard for shard in made if len(shard.roles)]
            if not kept:
                raise UserError(
                    f"Nothing is left of the {len(examples)} examples for {split} when cut at "
                    f"data.seq_len = {recipe.seq_len}: raise it, or give examples that have a response."
                )
            for shard in (shard for shard in made if not len(shard.roles)):
                shard.path.unlink()
            report[split] = summed(shard.counts for shard in made)
            check_lengths(recipe, report[split])
            infos.append(shards.name_shards(directory, split, kept))
            statistics = shards.merge(kept, names)
            if split == "train":
                check_streams(recipe, {name for name in names if statistics[f"{name}.lengths"].any()})
            np.savez(directory / f"{split}.npz", **statistics)
    shards.write_info(directory, infos, names)
    report["checks"] = look.found()
    (directory / "report.json").write_text(json.dumps(report, indent=2))


def _arrays(example: dict) -> dict:
    """A record as `Records` gives it, of what TFDS read."""
    return {
        key: value.decode() if key == "id" else value.astype(bool) if key.endswith("_loss") else value
        for key, value in example.items()
    }


@contextlib.contextmanager
def _naming_damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of three libraries
        raise UserError(
            f"The records in {directory} are damaged ({error!r:.200}): remove the folder, and they are made "
            "again."
        ) from error


def _check_metadata(directory: Path, names: tuple[str, ...]) -> None:
    """TFDS imports the Python modules and opens the files that its own files name."""
    features, info = (json.loads((directory / f"{n}.json").read_text()) for n in ("features", "dataset_info"))
    files = {(info["name"], s["name"].isalpha(), s["filepathTemplate"]) for s in info["splits"]}
    ours = {("prom", True, "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")}
    if features != MessageToDict(shards.features(names).to_proto()) or files != ours:
        raise ValueError("its metadata is not ours")
