"""Tokenised examples on disk: TFDS ArrayRecord files in a folder named by what determines them.

An example's text in a stream (see `examples`) is its tokens and a mask of those that have a loss.
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
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.json_format import MessageToDict

from prom_jax.data import quality, sources
from prom_jax.data import templates as prompts
from prom_jax.data.chat_templates import find_template, own_template
from prom_jax.data.examples import (
    CONVERSION,
    ENGLISH,
    PRIMARY,
    Example,
    Recipe,
    check_streams,
    read_examples,
    role_in,
)
from prom_jax.data.shared_prefixes import NONE, PrefixIndex, common_prompt
from prom_jax.data.templates import Dialogue, Plain, Span, Template, Unusable
from prom_jax.data.tokens import EncodedText, encode
from prom_jax.tokenization import folder as tokenizers
from prom_jax.utils.console import track
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.process import num_cpus
from prom_jax.utils.workdir import make_directory

with needs("data"):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

VERSION = 4  # part of the fingerprint: raise it whenever the same recipe gives other records
CHUNK = 512  # examples tokenised at once
SHARD = 4096  # examples a file, and a task of a worker
PARALLEL = 16_384  # examples from which on workers are worth the seconds that they take to start
COUNTS = ("examples", "tokens", "loss_tokens", "text_tokens", "bytes", "words", "truncated", "dropped")
NO_TARGET = "its target is dropped"  # why a text is dropped that could be used
_shared: tuple = ()  # of a worker, as `_share` gives it


# Records --------------------------------------------------------------------------------------


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
        """Several examples at once, which is faster than one by one."""
        return [
            {
                key: value.decode() if key == "id" else value.astype(bool) if key.endswith("_loss") else value
                for key, value in example.items()
            }
            for example in self._source.__getitems__(list(map(int, indices)))
        ]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: training records, the held-out pairs and plain texts (None where not
    asked for), and the report: {"unmatched": rows, "rows": what became of those of
    each source, "checks": as `quality.look` gives them, split: {role: counts}}, the roles being those of
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
    template = find_template(recipe.template, tokenizer)

    def usable(example: Example) -> bool:
        return any(True for _ in _tokenise([example], tokenizer, template, recipe, {}))

    splits, unmatched, rows = read_examples(recipe, usable)
    found = {stream for examples in splits.values() for example in examples for stream in example.texts}
    names = recipe.streams + tuple(sorted(found - set(recipe.streams)))
    report: dict[str, Any] = {"unmatched": unmatched, "rows": rows, "checks": _look(recipe, splits)}
    infos = []
    settings = tokenizer, recipe, names
    with _workers(sum(map(len, splits.values())), settings) as each:
        for split, examples in splits.items():
            parts = [examples[first : first + SHARD] for first in range(0, len(examples), SHARD)]
            tasks = [(directory / f"{split}-{number}.partial", part) for number, part in enumerate(parts)]
            shards = list(track(each(tasks), f"tokenising {split}", len(tasks)))
            if not any(shard.roles for shard in shards):
                raise UserError(
                    f"Nothing is left of the {len(examples)} examples for {split} when cut at "
                    f"data.seq_len = {recipe.seq_len}: raise it, or give examples that have a response."
                )
            for shard in (shard for shard in shards if not shard.roles):
                shard.path.unlink()
            report[split] = _summed(shard.counts for shard in shards)
            _check_lengths(recipe, report[split])
            shards = [shard for shard in shards if shard.roles]
            infos.append(_name_shards(directory, split, shards))
            statistics = _merge(shards, names)
            if split == "train":
                check_streams(recipe, {name for name in names if statistics[f"{name}.lengths"].any()})
            np.savez(directory / f"{split}.npz", **statistics)
    _write_info(directory, infos, names)
    (directory / "report.json").write_text(json.dumps(report, indent=2))


def _look(recipe: Recipe, splits: dict[str, list[Example]]) -> dict:
    """What is suspicious in the texts that are trained on (`quality.look`)."""
    texts: dict[str, tuple[str, list]] = {}
    pairs: dict[str, list[tuple]] = {}
    for example in splits.get("train", []):
        for stream, text in example.texts.items():
            role = role_in(stream, example.role)
            if role not in (CONVERSION, "translation_source"):
                language = recipe.language if stream == PRIMARY else "en"
                texts.setdefault(role, (language, []))[1].append(text)
        target, english = (example.texts.get(stream) for stream in (PRIMARY, ENGLISH))
        if example.role == "translation" and isinstance(target, Dialogue):
            pairs.setdefault("translation", []).extend((turn.input, turn.output) for turn in target.turns)
        elif example.role == "target" and target and english and not recipe.shuffled:
            pairs.setdefault("target", []).append((quality.answer(english), quality.answer(target)))
    held_out = splits.get("holdout", [])
    same = held_out[0].role if held_out else ""
    held = [example.texts[PRIMARY] for example in held_out if PRIMARY in example.texts]
    return quality.look(texts, pairs, held, same)


def _check_lengths(recipe: Recipe, counts: dict[str, dict]) -> None:
    """Raises UserError for texts that are too long, where these are refused."""
    long = {role: numbers["truncated"] for role, numbers in counts.items() if numbers["truncated"]}
    if recipe.too_long == "refuse" and long:
        numbers = ", ".join(f"{number:,} of {role}" for role, number in long.items())
        raise UserError(
            f"{sum(long.values()):,} texts are longer than data.seq_len={recipe.seq_len} ({numbers}): raise "
            "it, or set data.too_long to cut or drop."
        )


@dataclass(frozen=True)
class Shard:
    """A file that was written: the role of each example, how often an epoch has it, and its statistics by
    stream, rows in the order of STATISTICS; the prefixes that texts share by stream; and counts by role."""

    path: Path
    roles: list[str]
    repeats: list[int]
    statistics: dict[str, list[tuple[int, ...]]]
    prefixes: dict[str, PrefixIndex]
    counts: dict[str, Counter]


STATISTICS = ("lengths", "weights", "bytes", "prefix_ids", "common_prompts")


@contextlib.contextmanager
def _workers(examples: int, settings: tuple) -> Iterator[Callable]:
    """Gives a map of `_write_shard` over tasks: in processes, or here when there is little to do.

    Args:
      settings: tokenizer, recipe, and names of the streams.
    """
    number = min(num_cpus(), -(-examples // SHARD))
    if examples < PARALLEL or number == 1:
        yield lambda tasks, shared=_share(*settings): map(functools.partial(_write_shard, shared), tasks)
        return
    # Not forked: JAX has threads by now.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(number, context, _init_worker, settings) as pool:
            yield lambda tasks: pool.map(_write_in_worker, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"One of the {number} processes that tokenise was killed: free some memory and run the same "
            "command again; a script of your own needs `if __name__ == '__main__':` around its work."
        ) from error


def _share(tokenizer, recipe: Recipe, names: tuple[str, ...]) -> tuple:
    """What all tasks share."""
    return tokenizer, find_template(recipe.template, tokenizer), recipe, names, _features(names)


def _init_worker(*settings) -> None:
    """Sets what all tasks of a worker share."""
    global _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
    _shared = _share(*settings)


def _write_in_worker(task: tuple[Path, list[Example]]) -> Shard:
    return _write_shard(_shared, task)


def _write_shard(shared: tuple, task: tuple[Path, list[Example]]) -> Shard:
    """Tokenises examples and writes those that keep something to learn."""
    tokenizer, template, recipe, names, features = shared
    path, examples = task
    shard = Shard(path, [], [], {name: [] for name in names}, {name: PrefixIndex() for name in names}, {})
    chunks = [examples[first : first + CHUNK] for first in range(0, len(examples), CHUNK)]

    def tokenise(chunk):
        return list(_tokenise(chunk, tokenizer, template, recipe, shard.counts))

    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        with ThreadPoolExecutor(1) as ahead:  # the tokenizer works while records are written
            for example, texts in itertools.chain.from_iterable(ahead.map(tokenise, chunks)):
                writer.write(features.serialize_example(_record(example.id, names, texts)))
                _add_statistics(shard, example, names, texts)
    finally:
        writer.close()
    return shard


def _features(names: tuple[str, ...]) -> tfds.features.FeaturesDict:
    """Of a record with these streams."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    loss = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
    streams = ({f"{name}_tokens": tokens, f"{name}_loss": loss} for name in names)
    return tfds.features.FeaturesDict(functools.reduce(dict.__or__, streams, {"id": tfds.features.Text()}))


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
    if features != MessageToDict(_features(names).to_proto()) or files != ours:
        raise ValueError("its metadata is not ours")


def _name_shards(directory: Path, split: str, shards: list[Shard]) -> tfds.core.SplitInfo:
    """Give the files the names that TFDS looks for."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="prom", split=split, filetype_suffix="array_record", data_dir=directory
    )
    for number, shard in enumerate(shards):
        os.rename(shard.path, template.sharded_filepath(shard_index=number, num_shards=len(shards)))
    lengths = [len(shard.roles) for shard in shards]
    size = sum(path.stat().length for path in template.sharded_filepaths(num_shards=len(shards)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _write_info(directory: Path, splits: list[tfds.core.SplitInfo], names: tuple[str, ...]) -> None:
    """What makes the folder a data set that `tfds.builder_from_directory` opens."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="prom",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=_features(names))
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(str(directory))


def _tokenise(
    examples: list[Example], tokenizer, template: Template, recipe: Recipe, counts: dict[str, Counter]
) -> Iterator[tuple[Example, dict[str, EncodedText]]]:
    """(example, texts by stream) of those that keep something to learn."""
    usable = []
    for example in examples:
        if example.unusable:
            counts.setdefault(example.role, Counter()).update({"dropped": 1, ("reason", example.unusable): 1})
        else:
            usable.append((example, {s: _spans(text, template) for s, text in example.texts.items()}))
    spans = [s for _, texts in usable for s in texts.values() if not isinstance(s, Unusable)]
    encoded = iter(encode(tokenizer, spans, recipe.seq_len, template))
    for example, texts in usable:
        kept: dict[str, EncodedText] = {}
        for number, (stream, rendered) in enumerate(texts.items()):
            of_role = counts.setdefault(role_in(stream, example.role), Counter())
            text = rendered if isinstance(rendered, Unusable) else next(encoded)
            if recipe.too_long == "drop" and isinstance(text, EncodedText) and text.truncated:
                text = Unusable("longer than data.seq_len")
            # The others go with the first, which is the target's where there is one.
            is_kept = _count(of_role, text, with_target=number == 0 or bool(kept))
            if is_kept and isinstance(text, EncodedText):
                kept[stream] = text
        if kept:
            yield example, kept
        for stream, whole in kept.items():
            for piece in whole.rest:
                if _count(counts[role_in(stream, example.role)], piece):
                    yield example, {stream: piece}


def _spans(text: Dialogue | Plain, template: Template) -> list[Span] | Unusable:
    """What the model reads of a text, or why it cannot."""
    try:
        return template.spans(text)
    except Unusable as error:
        return error


def _count(counts: Counter, text: EncodedText | Unusable, with_target: bool = True) -> bool:
    """Enters a text in its role's counts; whether it is kept: it has text to learn, and its target too."""
    if isinstance(text, Unusable):
        counts.update({"dropped": 1, ("reason", str(text) if with_target else NO_TARGET): 1})
        return False
    kept = with_target and text.words > 0
    if kept:
        counts.update(
            examples=1,
            tokens=len(text.tokens),
            loss_tokens=int(text.loss.sum()),
            text_tokens=int(text.loss.sum()) - text.eos,
            bytes=text.bytes,
            words=text.words,
            truncated=int(text.truncated),
        )
    else:
        reason = "nothing left after cutting" if text.truncated else "no response"
        counts.update({"dropped": 1, ("reason", reason if with_target else NO_TARGET): 1})
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


def _add_statistics(
    shard: Shard, example: Example, names: tuple[str, ...], texts: dict[str, EncodedText]
) -> None:
    """Enters an example; prefix ids are the shard's own."""
    shard.roles.append(example.role)
    shard.repeats.append(example.repeat)
    primary = texts.get(names[0])
    for name in names:
        text = texts.get(name)
        counts = (len(text.tokens), int(text.loss.sum()), text.bytes) if text else (0, 0, 0)
        common = common_prompt(primary, text) if primary and text and name != names[0] else 0
        shard.statistics[name].append((*counts, shard.prefixes[name].add(text), common))


def _merge(shards: list[Shard], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What `Records` reads: the statistics of all shards, with prefix ids of their own."""
    role_names, roles = np.unique([role for shard in shards for role in shard.roles], return_inverse=True)
    merged = {"names": np.array(names), "role_names": role_names, "roles": roles}
    repeats = np.array([number for shard in shards for number in shard.repeats], np.int64)
    merged |= {"repeats": repeats} if (repeats != 1).any() else {}
    for name in names:
        every, columns = PrefixIndex(), []
        for shard in shards:
            of_shard = np.array(shard.statistics[name], np.int64).T
            ids = of_shard[STATISTICS.index("prefix_ids")]
            numbers = every.merge(shard.prefixes[name])
            ids[ids != NONE] = numbers[ids[ids != NONE]]
            columns.append(of_shard)
        statistics = zip(STATISTICS, np.concatenate(columns, axis=1), strict=True)
        merged |= {f"{name}.{field}": column for field, column in statistics}
        merged[f"{name}.prefix_lengths"] = every.lengths()
    return merged


def _record(example: str, names: tuple[str, ...], texts: dict[str, EncodedText]) -> dict:
    """What is written of an example."""
    none = np.zeros(0, np.int32)
    record = {"id": example}
    for name in names:
        text = texts.get(name)
        record[f"{name}_tokens"] = text.tokens if text else none
        record[f"{name}_loss"] = (text.loss if text else none).astype(np.uint8)
    return record
