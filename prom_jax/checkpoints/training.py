"""The training state of some steps, and with them what the model is.

    checkpoints/
      model.json     architecture, pivot layer, dtype of the source, how it was made
      tokenizer/     as Hugging Face saves it
      <step>/        params and, for training, optimizer state and their checksums

The data position is the step number, so there is nothing else to keep. A directory may be a path or a place
in an object store, gs://bucket/….
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from prom_jax.checkpoints.description import check_readable
from prom_jax.checkpoints.orbax import FILE_BYTES, Manager, save_args
from prom_jax.checkpoints.storage import (
    STORE_ERRORS,
    errors,
    is_remote,
    reason,
    reraise_storage_errors,
    resolve_path,
)
from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process

CHECKSUMS = "checksums"


class Checkpoints:
    """The steps in a directory. Saving goes on in the background; a step appears when it is whole.

    Args:
      directory: made if missing.
      keep: how many of the latest steps stay (None: all).
      keep_best: how many of those with the lowest held-out loss stay too.
      keep_every: steps that are multiples of it stay too; 0: none.

    Raises:
      UserError: if the directory cannot be made or read, or holds steps of another version of prom_jax.
    """

    def __init__(self, directory, keep: int | None = None, keep_best: int = 0, keep_every: int = 0):
        self.directory = resolve_path(directory)
        check_readable(self.directory)
        policies = [LatestN(keep)]
        if keep_best:
            best = {"get_metric_fn": lambda metrics: metrics["loss"], "reverse": True}
            policies.append(BestN(n=keep_best, keep_checkpoints_without_metrics=False, **best))
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        self._policy = AnyPreservationPolicy(policies)
        self._step, self._failure = 0, ""  # what is being saved; why the last save failed
        self._open()

    def _open(self):
        remote = is_remote(self.directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not remote,  # there it would remove every folder but the steps
        )
        with reraise_storage_errors(self.directory):
            self._manager = Manager(self.directory, options=options)
            if remote and is_main_process() and self.directory.exists():
                whole = set(map(str, self._manager.all_steps()))
                for place in self.directory.iterdir():
                    if place.name.isdecimal() and place.name not in whole:
                        place.rmtree()

    def latest(self) -> int | None:
        """The last whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, loss: float | None = None, **items):
        """Starts saving `items` (trees of arrays, such as params= and opt_state=) as `step`.

        If the save before failed, or this one cannot begin, a warning says so and the caller goes on:
        earlier steps are whole, and the next save tries again.

        Args:
          step: its number.
          loss: held-out, by which the best steps are chosen.
          items: trees of arrays.

        Raises:
          UserError: with several processes, if a save failed.
        """
        self._finish()
        self._failure = ""
        args = {name: ocp.args.PyTreeSave(item, save_args(item), FILE_BYTES) for name, item in items.items()}
        args[CHECKSUMS] = ocp.args.JsonSave(checksums(items))
        metrics = None if loss is None else {"loss": float(loss)}
        self._step = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
        except errors(self.directory) as error:
            self._failed(error)

    def resume(self, **items):
        """Reads the last step that is whole; damaged ones are named and renamed to `<step>.damaged`.

        Args:
          items: abstract trees, whose shapes, dtypes and shardings the results have.

        Returns:
          The step and the items, a tuple in their order; 0 and None where there is no whole step.

        Raises:
          UserError: with several processes, for a damaged step: run again to go on from the one before; if
            the directory cannot be read at all.
        """
        with reraise_storage_errors(self.directory):
            while step := self.latest():
                try:
                    restored = self.restore(step, **items)
                except STORE_ERRORS as error:
                    self._quarantine(step, error)
                else:
                    console.print(f"resumed   after step {step}")
                    return step, restored
        return 0, None

    def restore(self, step: int, **items) -> tuple:
        """Reads items of `step` into the shapes, dtypes and shardings of the given abstract trees.

        Raises:
          ValueError, OSError, KeyError, TypeError: where the step is damaged.
        """
        args = {
            name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
            for name, item in items.items()
        }
        args[CHECKSUMS] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        for name, found in checksums({name: restored[name] for name in items}).items():
            if restored[CHECKSUMS][name] != found:
                raise ValueError(f"the values of {name} are not those that were saved")
        return tuple(restored[name] for name in items)

    def close(self):
        """Waits until everything is written.

        Raises:
          UserError: if the last save failed.
        """
        self._finish()
        self._manager.close()
        if self._failure:
            raise UserError(self._failure)

    def _finish(self):
        try:
            while jax.process_count() > 1 and self._manager.is_saving_in_progress():
                if self._manager.failure:
                    raise self._manager.failure
                time.sleep(0.05)
            self._manager.wait_until_finished()
        except errors(self.directory) as error:
            self._failed(error)

    def _failed(self, error: Exception):
        message = (
            f"{self.directory}: step {self._step} could not be saved ({reason(error)}): free some space or "
            "choose another checkpoint.directory"
        )
        if jax.process_count() > 1:  # the others wait for this one's part of the step
            raise UserError(message) from error
        self._failure = message
        with contextlib.suppress(*errors(self.directory)):  # it raises the same again
            self._manager.close()
        with contextlib.suppress(UserError):  # an object store may be out of reach for longer
            self._open()  # forgets the step, and removes what there is of it
            self._failure += f"; the last whole step is {self.latest() or 'none'}"
        console.print(f"WARNING   {self._failure}")

    def _quarantine(self, step: int, error: Exception):
        place, aside = self.directory / str(step), self.directory / f"{step}.damaged"
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process may be first
            if place.exists() and aside.exists():
                aside.rmtree()
            place.rename(aside)
        message = f"{self.directory}: step {step} is damaged ({reason(error)}), it is now {aside.name}"
        if jax.process_count() > 1:  # the others may have read their parts of it
            raise UserError(f"{message}: run the same command to go on from the step before") from error
        self._manager.close()
        self._open()
        console.print(f"WARNING   {message}; going on from step {self.latest() or 'none'}")


def checksums(tree) -> dict[str, int]:
    """The sum of each array's bits, as unsigned integers modulo 2³², by its place in the tree: the same on
    every mesh, and another one if a bit has changed."""
    sums = jax.device_get(_sums(tree))
    return {jax.tree_util.keystr(path): int(x) for path, x in jax.tree.leaves_with_path(sums)}


@jax.jit
def _sums(tree):
    def bits(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    return jax.tree.map(bits, tree)
