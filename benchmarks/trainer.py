"""python -m benchmarks.trainer --config=FILE[:variant] [--repetitions=5] [--out=FILE] [training flags]

Is the torch peer of benchmarks.train_step at its best? Times its updates (`published`) beside those of
transformers' Trainer with the same rows, loss, dtype, threads, clipping and fused AdamW, each in a process of
its own; they take turns, and a first update of each is not counted. Trainer gets an update's rows in
batch.sequences batches, whose losses its `compute_loss` returns. The learning rate is constant. Needs
requirements-dev.txt.
"""

import os
import queue
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks import measure, peers, train_step
from prom_jax import train
from prom_jax.checkpoints import pretrained as models
from prom_jax.training.methods.prom import PROM
from prom_jax.utils import cli, command
from prom_jax.utils.errors import UserError


def main(argv=None):
    """Reads the command line, measures and reports."""
    parser = cli.Parser("benchmarks.trainer", __doc__)
    parser.add_run()
    measure.add_arguments(parser, 5, "updates of each side that count")
    arguments = parser.parse_args(argv)
    config = measure.configuration(arguments.config, arguments.repetitions + 1)
    with tempfile.TemporaryDirectory() as folder:
        job = train.plan(config, Path(folder, "run"))
        source = f"{folder}/hf"
        models.save_hf(*models.load(config.model), source, dtype="float32")
        texts = [train_step.texts(job, step) for step in range(config.steps)]
        about = source, job.method, config
        sides = {
            "Trainer": measure.Worker(Trained, *about, texts),
            "peer": measure.Worker(Constant, *about, texts),
        }
        losses, processors = ({name: [] for name in sides} for _ in range(2))

        def update(name):
            loss, used = sides[name].call("timed_step")
            losses[name].append(loss), processors[name].append(used)

        turns = {name: lambda name=name: update(name) for name in sides}
        seconds = measure.interleaved(turns, arguments.repetitions)
    processors = {name: each[1:] for name, each in processors.items()}
    rows = [
        measure.compared("seconds an update", seconds),
        measure.compared("the same, of the processors", processors),
    ]
    apart = float(np.abs(np.divide(losses["peer"], losses["Trainer"]) - 1).max())
    notes = (
        f"losses differ by {apart:.1e} of these at most",
        f"{config.compute_dtype}, remat {config.remat}",
    )
    measure.report("The torch peer beside transformers' Trainer", rows, arguments.out, notes)
    if config.compute_dtype == "float32" and not apart < train_step.TOLERANCE:
        raise UserError(f"the two sides differ in their losses by {apart:.1e}: they do not compute the same")


class Timed:
    """A side whose `step` is the next update and returns its loss."""

    def timed_step(self) -> tuple[float, float]:
        """`step`, and the seconds that it took of the processors, in which others have little part."""
        began = time.process_time()
        return self.step(), time.process_time() - began


class Constant(Timed, peers.Peer):
    """The peer with all its texts, at one learning rate."""

    def __init__(self, source: str, method: PROM, config, texts: list[dict]):
        super().__init__(source, "published", method, config, False)
        self.texts = iter(texts)

    def step(self) -> float:
        """The next update; returns its loss."""
        return super().step(next(self.texts), self.config.optimizer.learning_rate)[0]


class Trained(Timed, transformers.TrainerCallback):
    """A run of Trainer in a thread that waits for its turn after each update."""

    def __init__(self, source: str, method: PROM, config, texts: list[dict]):
        self.go, self.done = queue.Queue(), queue.Queue()
        rows = [peers.rows(some, peers.packed, config.data.seq_len, method) for some in texts]
        parts = min(config.batch.sequences, *map(len, rows))
        arguments = transformers.TrainingArguments(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=parts,
            max_steps=len(texts),
            learning_rate=config.optimizer.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.clip,
            optim="adamw_torch_fused",
            bf16=config.compute_dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        self.trainer = PromTrainer(
            peers.load(source, method, config),
            arguments,
            data_collator=lambda batch: batch[0],
            train_dataset=InOrder(update[i::parts] for update in rows for i in range(parts)),
            callbacks=[self],
        )
        self.trainer.method = method
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        command.keep_freed_memory()
        try:
            self.trainer.train()
        except BaseException as error:  # which the thread would keep to itself
            self.done.put(error)

    def on_train_begin(self, *_, **__):
        """Waits for the first turn."""
        self.go.get()

    def on_step_end(self, *_, **__):
        """Tells the loss, and waits for the next turn."""
        self.done.put(float(self.trainer.total))
        self.trainer.total = 0.0
        self.go.get()

    def step(self) -> float:
        """The next update; returns its loss."""
        self.go.put(None)
        result = self.done.get()
        if isinstance(result, BaseException):
            raise result
        return result


class PromTrainer(transformers.Trainer):
    """Trainer with PROM's loss of a batch of rows."""

    total = 0.0  # loss of the update so far

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The rows' part of the update's loss, for Trainer to divide by the number of batches."""
        loss = sum(peers.row_loss(model, model.model, row, self.method) for row in inputs)
        self.total += loss.detach()
        return loss * self.args.gradient_accumulation_steps


class InOrder(torch.utils.data.IterableDataset):
    """A data set of what is given, in its order."""

    def __init__(self, items):
        self.items = list(items)

    def __iter__(self):
        return iter(self.items)


if __name__ == "__main__":
    cli.guard(main)
