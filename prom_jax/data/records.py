"""Tokenised examples on disk: TFDS ArrayRecord files in a folder named by what determines them.

A side of an example (see `examples`) is its tokens and a mask of those that bear loss.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.json_format import MessageToDict

from prom_jax.data import sources
from prom_jax.data import templates as prompts
from prom_jax.data.examples import Example, Recipe, read_examples
from prom_jax.data.shared_prefixes import NONE, Beginnings, common_prompt
from prom_jax.data.tokens import Side, encode
from prom_jax.tokenization import folder as tokenizers
from prom_jax.utils.console import track
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import make_directory

VERSION = 3  # part of the fingerprint: raise it whenever the same recipe gives other records
CHUNK = 512  # examples tokenised at once
SHARD = 4096  # examples a file, and a task of a worker
PARALLEL = 16_384  # from so many examples on, workers are worth the seconds that they take to start
ROLES = ("target", "english", "translation", "translation_source", "text")
COUNTS = ("examples", "tokens", "loss_tokens", "text_tokens", "bytes", "words", "truncated", "dropped")
_shared: tuple = ()  # of a worker: tokenizer, seq_len, features
SIDES = ("target", "english")
STATISTICS = (
    "roles",
    *(f"{side}_{what}" for side in SIDES for what in ("lengths", "weights", "bytes", "kinds")),
    "common_prompts",
)


# Records --------------------------------------------------------------------------------------


class Records:
    """The examples of one split, read at random.

    `records[i]` is {"id": str, "target_tokens": int32 [T], "target_loss": bool [T],
    "english_tokens", "english_loss"}; the English arrays are empty where there is no English side.

    Attributes (arrays, one entry an example; int64 but for the roles):
      roles: indices into ROLES, of the target side.
      target_lengths, english_lengths: tokens; 0 where there is no English side.
      target_weights, english_weights: tokens that bear loss.
      target_bytes, english_bytes: UTF-8 bytes under them, EOS not counted (for bits per byte).
      target_kinds, english_kinds: kind of prompt, -1 where it is like no other; target_beginnings,
        english_beginnings: tokens that all texts of a kind begin with, without loss [kinds].
      common_prompts: tokens, without loss, with which both sides of an example begin.

    Raises:
      UserError: the files are not as `prepare` made them.
    """

    def __init__(self, directory: Path, split: str):
        with _naming_damage(directory):
            _check_metadata(directory)
            self._source = tfds.builder_from_directory(str(directory)).as_data_source(split)
            with np.load(directory / f"{split}.npz") as statistics:
                for name in (*STATISTICS, *(f"{side}_beginnings" for side in SIDES)):
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
    asked for), and the report: {"unmatched": rows, split: {role: counts}}, the roles being ROLES and
    the counts "examples", "tokens", "loss_tokens", "bytes" and "words" (of the text that bears loss),
    "text_tokens" (those without EOS), "truncated", "dropped" and "reasons" ({why: dropped}).
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
                    f"The records cannot be written into {directory} ({error}): make room."
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with _naming_damage(final):
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
    parts = {
        "versions": [VERSION, prompts.VERSION],
        "recipe": dataclasses.asdict(recipe),
        "words": [dataclasses.asdict(words) for words in (recipe.words, prompts.wording("en"))],
        "sources": [sources.fingerprint(*source) for source in used],
        "tokenizer": tokenizers.fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(recipe: Recipe, tokenizer, directory: Path) -> None:
    splits, unmatched = read_examples(recipe)
    report, infos = {"unmatched": unmatched}, []
    with _workers(sum(map(len, splits.values())), tokenizer, recipe.seq_len) as each:
        for split, examples in splits.items():
            parts = [examples[first : first + SHARD] for first in range(0, len(examples), SHARD)]
            tasks = [(directory / f"{split}-{number}.partial", part) for number, part in enumerate(parts)]
            shards = list(track(each(tasks), f"tokenising {split}", len(tasks)))
            if not any(shard.statistics for shard in shards):
                raise UserError(
                    f"Nothing is left of the {len(examples)} examples for {split} when cut at "
                    f"data.seq_len = {recipe.seq_len}: raise it, or give examples that have a response."
                )
            for shard in (shard for shard in shards if not shard.statistics):
                shard.path.unlink()
            report[split] = _summed(shard.counts for shard in shards)
            shards = [shard for shard in shards if shard.statistics]
            infos.append(_name_shards(directory, split, shards))
            np.savez(directory / f"{split}.npz", **_joined(shards))
    _write_info(directory, infos)
    (directory / "report.json").write_text(json.dumps(report, indent=2))


@dataclass(frozen=True)
class Shard:
    """A file that was written: a row of statistics an example, what each side's texts begin with, and counts
    by role."""

    path: Path
    statistics: list[list[int]]
    beginnings: dict[str, Beginnings]
    counts: dict[str, Counter]


@contextlib.contextmanager
def _workers(examples: int, tokenizer, seq_len: int) -> Iterator[Callable]:
    """Gives a map of `_write_shard` over tasks: in processes, or here when there is little to do."""
    shared = tokenizer, seq_len, _features()
    number = min(len(os.sched_getaffinity(0)), -(-examples // SHARD))
    if examples < PARALLEL or number == 1:
        yield lambda tasks: map(functools.partial(_write_shard, shared), tasks)
        return
    # Not forked: JAX has threads by now.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(number, context, _begin, (tokenizer, seq_len)) as pool:
            yield lambda tasks: pool.map(_write_in_worker, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"One of the {number} processes that tokenise was killed: free some memory and run the same "
            "command again; a script of your own needs `if __name__ == '__main__':` around its work."
        ) from error


def _begin(tokenizer, seq_len: int) -> None:
    """What all tasks of a worker share."""
    global _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
    _shared = tokenizer, seq_len, _features()


def _write_in_worker(task: tuple[Path, list[Example]]) -> Shard:
    return _write_shard(_shared, task)


def _write_shard(shared: tuple, task: tuple[Path, list[Example]]) -> Shard:
    """Tokenise examples and write those that keep something to learn."""
    tokenizer, seq_len, features = shared
    path, examples = task
    shard = Shard(path, [], {side: Beginnings() for side in SIDES}, {})
    chunks = [examples[first : first + CHUNK] for first in range(0, len(examples), CHUNK)]
    tokenise = lambda chunk: list(_tokenise(chunk, tokenizer, seq_len, shard.counts))
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        with ThreadPoolExecutor(1) as ahead:  # the tokenizer works while records are written
            for example, target, english in itertools.chain.from_iterable(ahead.map(tokenise, chunks)):
                writer.write(features.serialize_example(_record(example.id, target, english)))
                shard.statistics.append(_statistics(example.role, target, english, shard.beginnings))
    finally:
        writer.close()
    return shard


def _features() -> tfds.features.FeaturesDict:
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    loss = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "target_tokens": tokens,
            "target_loss": loss,
            "english_tokens": tokens,
            "english_loss": loss,
        }
    )


@contextlib.contextmanager
def _naming_damage(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of three libraries
        raise UserError(
            f"The records in {directory} are damaged ({error!r:.200}): remove the folder, and they are made "
            "again."
        ) from error


def _check_metadata(directory: Path) -> None:
    """TFDS imports the Python modules and opens the files that its own files name."""
    features, info = (json.loads((directory / f"{n}.json").read_text()) for n in ("features", "dataset_info"))
    files = {(info["name"], s["name"].isalpha(), s["filepathTemplate"]) for s in info["splits"]}
    ours = {("prom", True, "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")}
    if features != MessageToDict(_features().to_proto()) or files != ours:
        raise ValueError("its metadata is not ours")


def _name_shards(directory: Path, split: str, shards: list[Shard]) -> tfds.core.SplitInfo:
    """Give the files the names that TFDS looks for."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="prom", split=split, filetype_suffix="array_record", data_dir=directory
    )
    for number, shard in enumerate(shards):
        os.rename(shard.path, template.sharded_filepath(shard_index=number, num_shards=len(shards)))
    lengths = [len(shard.statistics) for shard in shards]
    size = sum(path.stat().length for path in template.sharded_filepaths(num_shards=len(shards)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _write_info(directory: Path, splits: list[tfds.core.SplitInfo]) -> None:
    """What makes the folder a data set that `tfds.builder_from_directory` opens."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="prom",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=_features())
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(str(directory))


def _tokenise(
    examples: list[Example], tokenizer, seq_len: int, counts: dict[str, Counter]
) -> Iterator[tuple[Example, Side, Side | None]]:
    """(example, target side, English side or None) of those that keep something to learn."""
    targets = encode(tokenizer, [example.target for example in examples], seq_len)
    asked = [example.english for example in examples if example.english]
    english = iter(encode(tokenizer, asked, seq_len) if asked else ())
    for example, target in zip(examples, targets, strict=True):
        other = next(english) if example.english else None
        of_role = counts.setdefault(example.role, Counter())
        if example.unusable:
            of_role.update({"dropped": 1, ("reason", example.unusable): 1})
            continue
        learns = _count(of_role, target)
        if other:
            of_role = counts.setdefault(example.english_role, Counter())
            other = other if _count(of_role, other, with_target=learns) else None
        if learns:
            yield example, target, other


def _count(counts: Counter, side: Side, with_target: bool = True) -> bool:
    """Enter `side` in its role's counts; whether it is kept: it has text to learn, and its target too."""
    kept = with_target and side.words > 0
    if kept:
        counts.update(
            examples=1,
            tokens=len(side.tokens),
            loss_tokens=int(side.loss.sum()),
            text_tokens=int(side.loss.sum()) - side.eos,
            bytes=side.bytes,
            words=side.words,
            truncated=int(side.truncated),
        )
    else:
        reason = "nothing left after cutting" if side.truncated else "no response"
        counts.update({"dropped": 1, ("reason", reason if with_target else "its target is dropped"): 1})
    return kept


def _summed(counts: Iterator[dict[str, Counter]]) -> dict[str, dict]:
    """The counts of all shards by role, as JSON has them."""
    total: dict[str, Counter] = {}
    for of_shard in counts:
        for role, numbers in of_shard.items():
            total.setdefault(role, Counter()).update(numbers)
    return {
        role: {name: numbers[name] for name in COUNTS}
        | {"reasons": {key[1]: number for key, number in numbers.items() if isinstance(key, tuple)}}
        for role, numbers in total.items()
    }


def _statistics(
    role: str, target: Side, english: Side | None, beginnings: dict[str, Beginnings]
) -> list[int]:
    """In the order of STATISTICS; kinds are the shard's own."""
    numbers = [ROLES.index(role)]
    for name, side in zip(SIDES, (target, english)):
        numbers += (len(side.tokens), int(side.loss.sum()), side.bytes) if side else (0, 0, 0)
        numbers.append(beginnings[name].add(side))
    return [*numbers, common_prompt(target, english) if english else 0]


def _joined(shards: list[Shard]) -> dict[str, np.ndarray]:
    """The statistics of all shards, with kinds of their own."""
    statistics = dict(
        zip(STATISTICS, np.concatenate([np.array(s.statistics, np.int64) for s in shards]).T, strict=True)
    )
    sizes = [len(shard.statistics) for shard in shards]
    for side in SIDES:
        every, kinds = Beginnings(), np.split(statistics[f"{side}_kinds"], np.cumsum(sizes)[:-1])
        for shard, of_shard in zip(shards, kinds):
            numbers = every.merge(shard.beginnings[side])
            of_shard[of_shard != NONE] = numbers[of_shard[of_shard != NONE]]
        statistics[f"{side}_kinds"], statistics[f"{side}_beginnings"] = np.concatenate(kinds), every.lengths()
    return statistics


def _record(name: str, target: Side, english: Side | None) -> dict:
    none = np.zeros(0, np.int32)
    record = {
        "id": name,
        "target_tokens": target.tokens,
        "english_tokens": english.tokens if english else none,
    }
    loss = {"target_loss": target.loss, "english_loss": english.loss if english else none}
    return record | {key: bears.astype(np.uint8) for key, bears in loss.items()}
