"""Writing examples: tokenised in as many processes as there are cores, into ArrayRecord files of 4,096, with
what is known of each example without reading it."""

import contextlib
import functools
import itertools
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prom_jax.data.encoding import Encoder
from prom_jax.data.examples import Example, Recipe
from prom_jax.data.shared_prefixes import NONE, PrefixIndex, common_prompt
from prom_jax.data.tokens import EncodedText
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs
from prom_jax.utils.process import num_cpus

with needs("data"):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

CHUNK = 512  # examples tokenised at once
SHARD = 4096  # examples a file, and a task of a worker
PARALLEL = 16_384  # examples from which on workers are worth the seconds that they take to start
AHEAD = 2  # tasks a worker that wait for it
STATISTICS = ("lengths", "weights", "bytes", "prefix_ids", "common_prompts")
_shared: tuple[Encoder, tuple[str, ...]]  # of a worker: encoder and names of the streams


@dataclass(frozen=True)
class Shard:
    """A file that was written.

    roles: of each example.
    repeats: how often an epoch has each, int64 [examples].
    statistics: by stream, int64 [STATISTICS, examples]; prefix ids are the shard's own.
    prefixes: that texts share, by stream.
    counts: of all texts, by role.
    """

    path: Path
    roles: np.ndarray
    repeats: np.ndarray
    statistics: dict[str, np.ndarray]
    prefixes: dict[str, PrefixIndex]
    counts: dict[str, Counter]


@contextlib.contextmanager
def writers(examples: int, tokenizer, recipe: Recipe, names: tuple[str, ...]) -> Iterator[Callable]:
    """Gives a map of tasks (path, examples) to the shards that are written of them, in order: in processes,
    or here when there is little to do.

    Args:
      examples: how many there are in all.
      names: of the streams.
    """
    number = min(num_cpus(), -(-examples // SHARD))
    if examples < PARALLEL or number == 1:
        shared = Encoder.of(recipe, tokenizer), names
        yield lambda tasks: map(functools.partial(write, *shared), tasks)
        return
    # Not forked: JAX has threads by now.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(number, context, _init_worker, (recipe, tokenizer, names)) as pool:
            yield lambda tasks: _map(pool, tasks, AHEAD * number)
    except BrokenProcessPool as error:
        raise UserError(
            f"One of the {number} processes that tokenise was killed: free some memory and run the same "
            "command again; a script of your own needs `if __name__ == '__main__':` around its work."
        ) from error


def _map(pool: ProcessPoolExecutor, tasks: Iterable, ahead: int) -> Iterator[Shard]:
    """As `pool.map`, but no more than `ahead` tasks are made before they are wanted."""
    waiting: deque = deque()
    for task in tasks:
        waiting.append(pool.submit(_write_in_worker, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _init_worker(recipe: Recipe, tokenizer, names: tuple[str, ...]) -> None:
    global _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
    _shared = Encoder.of(recipe, tokenizer), names


def _write_in_worker(task: tuple[Path, list[Example]]) -> Shard:
    encoder, names = _shared
    return write(encoder, names, task)


def write(encoder: Encoder, names: tuple[str, ...], task: tuple[Path, list[Example]]) -> Shard:
    """Tokenises the examples of a task and writes those that keep something to learn."""
    path, examples = task
    chunks = [examples[first : first + CHUNK] for first in range(0, len(examples), CHUNK)]
    roles, repeats, counts = [], [], {}
    statistics: dict[str, list] = {name: [] for name in names}
    prefixes = {name: PrefixIndex() for name in names}

    def encode(chunk):
        return list(encoder.encode(chunk, counts))

    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        with ThreadPoolExecutor(1) as ahead:  # the tokenizer works while records are written
            for example, texts in itertools.chain.from_iterable(ahead.map(encode, chunks)):
                writer.write(serialise(example.id, names, texts))
                roles.append(example.role)
                repeats.append(example.repeat)
                for name in names:
                    statistics[name].append(_statistics(name, names[0], texts, prefixes[name]))
    finally:
        writer.close()
    columns = {name: np.array(rows, np.int64).T for name, rows in statistics.items()}
    return Shard(path, np.array(roles), np.array(repeats, np.int64), columns, prefixes, counts)


def _statistics(
    name: str, primary: str, texts: dict[str, EncodedText], prefixes: PrefixIndex
) -> tuple[int, ...]:
    """What is known of a text, in the order of STATISTICS."""
    text, first = texts.get(name), texts.get(primary)
    if text is None:
        return 0, 0, 0, NONE, 0
    common = common_prompt(first, text) if first and name != primary else 0
    return len(text.tokens), int(text.loss.sum()), text.bytes, prefixes.add(text), common


def serialise(example: str, names: tuple[str, ...], texts: dict[str, EncodedText]) -> bytes:
    """A record as `features` describes it. TFDS does the same, three times slower."""
    message = tf_example_pb2.Example()
    features = message.features.feature
    features["id"].bytes_list.value.append(example.encode())
    for name in names:
        tokens, loss = (features[f"{name}_{part}"].int64_list for part in ("tokens", "loss"))
        if text := texts.get(name):
            tokens.value.extend(text.tokens.tolist())
            loss.value.extend(text.loss.view(np.uint8).tolist())
        else:
            tokens.SetInParent(), loss.SetInParent()  # empty, and not missing
    return message.SerializeToString()


def features(names: tuple[str, ...]) -> tfds.features.FeaturesDict:
    """Of a record with these streams."""
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    loss = tfds.features.Tensor(shape=(None,), dtype=np.uint8)
    streams = ({f"{name}_tokens": tokens, f"{name}_loss": loss} for name in names)
    return tfds.features.FeaturesDict(functools.reduce(dict.__or__, streams, {"id": tfds.features.Text()}))


def merge(shards: list[Shard], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What `records.Records` reads: the statistics of all shards, with prefix ids of their own."""
    role_names, roles = np.unique(np.concatenate([shard.roles for shard in shards]), return_inverse=True)
    merged = {"names": np.array(names), "role_names": role_names, "roles": roles}
    repeats = np.concatenate([shard.repeats for shard in shards])
    merged |= {"repeats": repeats} if (repeats != 1).any() else {}
    for name in names:
        every, columns = PrefixIndex(), []
        for shard in shards:
            of_shard = shard.statistics[name].copy()
            ids = of_shard[STATISTICS.index("prefix_ids")]
            numbers = every.merge(shard.prefixes[name])
            ids[ids != NONE] = numbers[ids[ids != NONE]]
            columns.append(of_shard)
        statistics = zip(STATISTICS, np.concatenate(columns, axis=1), strict=True)
        merged |= {f"{name}.{field}": column for field, column in statistics}
        merged[f"{name}.prefix_lengths"] = every.lengths()
    return merged


def name_shards(directory: Path, split: str, shards: list[Shard]) -> tfds.core.SplitInfo:
    """Gives the files the names that TFDS looks for."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name="prom", split=split, filetype_suffix="array_record", data_dir=directory
    )
    for number, shard in enumerate(shards):
        os.rename(shard.path, template.sharded_filepath(shard_index=number, num_shards=len(shards)))
    lengths = [len(shard.roles) for shard in shards]
    size = sum(path.stat().length for path in template.sharded_filepaths(num_shards=len(shards)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def write_info(directory: Path, splits: list[tfds.core.SplitInfo], names: tuple[str, ...]) -> None:
    """What makes the folder a data set that `tfds.builder_from_directory` opens."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="prom",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(names))
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(str(directory))
