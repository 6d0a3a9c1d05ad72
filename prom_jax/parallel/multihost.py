"""Many processes as one run: joining, waiting for one another, ending together when one cannot go on.

Each process has a thread that reports to the others, through JAX's coordinator in process 0, that it is alive
and where it is in its work. What it finds wrong ends all processes at once with the same message and exit
status, whatever their main threads are waiting for.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed as runtime  # the coordinator's key-value store has no public name

from prom_jax.utils.console import console
from prom_jax.utils.errors import UserError
from prom_jax.utils.process import LOST, MISTAKE, is_main_process

HEARTBEAT_SECONDS = 2.0  # between two signs of life
MAX_MISSED = 8  # heartbeats without a sign, after which a process is lost
SHUTDOWN_GRACE = 3  # seconds in which the others may take notice of a failure
# JAX itself ends processes that have lost another, but says so in a page of its own words. It looks for signs
# of life every half of this time, so that it comes 25 to 50 s after the loss: after us, and within a minute.
JAX_HEARTBEAT_SECONDS = 50
_FAILURE, _ALIVE = "prom_jax/failure", "prom_jax/alive/"

_watch: "_Watch | None" = None


def barrier(name: str):
    """Waits until all processes are here, however long that takes; `name` is used once in a run."""
    if jax.distributed.is_initialized():
        runtime.global_state.client.wait_at_barrier(f"prom_jax/{name}", timeout_in_ms=7 * 24 * 3600 * 1000)


@contextlib.contextmanager
def main_process_first(name: str):
    """Process 0 goes through the block alone, then the others, who find what it has left there."""
    if not is_main_process():
        barrier(name)
    yield
    if is_main_process():
        barrier(name)


def progress(where: str | None):
    """Says what this process does from now on, which is then limited in time; None: nothing to be limited."""
    if _watch:
        _watch.progress(where)


@contextlib.contextmanager
def run_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    connect_timeout: float = 300,
    hang_timeout: float = 0,
):
    """Runs the block in step with the other processes of the run, if there are others.

    Who they are is found by JAX in the environment (SLURM, Open MPI, Cloud TPU, Kubernetes) where not given.
    When one process fails, is killed or hangs, all end within a minute: with MISTAKE where a `UserError` says
    why, else with LOST.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: which this is.
      connect_timeout: seconds to wait until all have come.
      hang_timeout: seconds that one thing that `progress` reports may take; 0 for any time.

    Raises:
      UserError: for some but not all of the first three, where the environment has not the rest.
    """
    global _watch
    joined = _join(coordinator, num_processes, process_id, connect_timeout)
    console.quiet = not is_main_process()
    _watch = _Watch(hang_timeout)
    _watch.start()
    try:
        yield
    except SystemExit:
        _leave(joined)
        raise
    except BaseException as error:
        if not joined:
            raise
        _watch.fail(*_explain(error))
    else:
        _leave(joined)
    finally:
        _watch.stop()
        _watch = None


def _join(coordinator, num_processes, process_id, timeout: float) -> bool:
    """Starts `jax.distributed` if this is one of several processes; whether it is."""
    preemption = jax.config.jax_enable_preemption_service
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    given = coordinator, num_processes, process_id
    late = threading.Timer(timeout, _end_unconnected, [timeout])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=int(timeout) + JAX_HEARTBEAT_SECONDS,  # ours is first, and speaks plainly
            heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if given == (None, None, None) and isinstance(error, ValueError):
            return False  # nothing here tells of other processes
        raise UserError(
            f"this process cannot join the others ({str(error).strip().splitlines()[0]}): give "
            "--coordinator=host:port, --num_processes and --process_id"
        ) from error
    finally:
        late.cancel()
        jax.config.update("jax_enable_preemption_service", preemption)
    if _alone_on_its_host() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for platform in ("cuda", "rocm"):  # JAX took one device, as if there were a process for each
            jax.config.update(f"jax_{platform}_visible_devices", "all")
    return True


def _alone_on_its_host() -> bool:
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


def _end_unconnected(timeout: float):
    state = runtime.global_state
    _print_error(
        f"process {state.process_id}: not all processes have met at the coordinator "
        f"{state.coordinator_address} within {timeout:g} s: see that process 0 runs there, that its port is "
        "open, and that all of them are started"
    )
    os._exit(LOST)


def _print_error(message: str):
    with contextlib.suppress(OSError):  # the log may be on a full disk
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def _leave(joined: bool):
    """Waits for the others, so that none mistakes the end for a loss."""
    if joined and _watch:
        barrier("end")
        _watch.stop()
        jax.distributed.shutdown()


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message of an exception that ends a process."""
    if isinstance(error, UserError):
        return MISTAKE, str(error)
    if isinstance(error, KeyboardInterrupt):
        return LOST, "interrupted"
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        # The loss of another process shows so: let the watch name it.
        time.sleep((MAX_MISSED + 2) * HEARTBEAT_SECONDS)
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return LOST, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _silence() -> float:
    """Seconds without a sign of life after which a process is lost."""
    return MAX_MISSED * HEARTBEAT_SECONDS


class _Watch(threading.Thread):
    """Looks at this process and at the others every HEARTBEAT_SECONDS."""

    def __init__(self, hang_timeout: float):
        super().__init__(name="watch", daemon=True)
        self._client, self._process = runtime.global_state.client, runtime.global_state.process_id
        self._limit, self._since = hang_timeout, 0.0
        self._where: str | None = None
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._beats = 0
        self._heard: dict[int, tuple[str, int]] = {}  # of each process: its last sign, and how often seen

    def progress(self, where: str | None):
        """See `progress`."""
        self._since, self._where = time.monotonic(), where

    def stop(self):
        """Ends the thread."""
        self._stopped.set()
        if self.is_alive():
            self.join()

    def run(self):
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            unanswered = threading.Timer(_silence(), self._end_unanswered)
            unanswered.daemon = True
            unanswered.start()
            try:
                self._look()
            except jax.errors.JaxRuntimeError as error:
                if not self._stopped.is_set():
                    self.fail(LOST, f"process 0, the coordinator, is lost ({str(error).splitlines()[0]})")
            finally:
                unanswered.cancel()

    def _end_unanswered(self):
        """Ends this process, where process 0 has the connection open but does not answer."""
        if self._ending.locked():  # it has answered, and waits for the others to take notice
            return
        _print_error(
            f"process {self._process}: process 0, the coordinator, has not answered for {_silence():g} s: it "
            "was stopped, or its host is lost; run the same command to go on from the last checkpoint"
        )
        os._exit(LOST)

    def _look(self):
        where, since = self._where, self._since
        if self._client:
            self._beats += 1
            sign = f"{self._beats} {where}"
            self._client.key_value_set(f"{_ALIVE}{self._process}", sign, allow_overwrite=True)
            if self._failure():
                self.fail(LOST, "")
        if self._client and self._process == 0:
            self._listen()
        if where and 0 < self._limit < time.monotonic() - since:
            places = ", ".join(f"process {process} at {at}" for process, at in self._places().items())
            self.fail(
                LOST,
                f"nothing has moved for {self._limit:g} s (--hang_timeout): {places or where}; run the same "
                "command to go on from the last checkpoint",
            )

    def _signs(self) -> dict[int, str]:
        if not self._client:
            return {}
        pairs = self._client.key_value_dir_get(_ALIVE)
        return dict(sorted((int(key.rpartition("/")[2]), value) for key, value in pairs))

    def _places(self) -> dict[int, str]:
        return {process: sign.partition(" ")[2] for process, sign in self._signs().items()}

    def _listen(self):
        """Ends the run if a process has been silent for MAX_MISSED heartbeats of this one."""
        for process, sign in self._signs().items():
            before, seen = self._heard.get(process, ("", 0))
            self._heard[process] = sign, seen + 1 if sign == before else 0
        lost = [str(process) for process, (_, seen) in self._heard.items() if seen >= MAX_MISSED]
        if lost:
            self.fail(
                LOST,
                f"process {', '.join(lost)} has given no sign of life for {_silence():g} s: it was killed or "
                "stopped, or its host is lost; run the same command to go on from the last checkpoint",
            )

    def _failure(self) -> str:
        return next((value for _, value in self._client.key_value_dir_get(_FAILURE)), "")

    def fail(self, code: int, message: str):
        """Ends all processes, with the first failure that any of them reported."""
        if not self._ending.acquire(blocking=False):  # another thread does so
            time.sleep(2 * SHUTDOWN_GRACE)
        if self._client:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(f"{_FAILURE}/0", f"{code} {self._process} {message}")
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                first, process, message = self._failure().split(" ", 2)
                code, message = int(first), f"process {process}: {message}"
        _print_error(message)
        if self._client:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.wait_at_barrier(f"{_FAILURE}/known", timeout_in_ms=SHUTDOWN_GRACE * 1000)
            if self._process == 0:  # with it goes the coordinator
                time.sleep(0.5)
        os._exit(code)
