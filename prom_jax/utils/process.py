"""This process among others: which one it is, and with what status it ends."""

import os

import jax

MISTAKE = 2  # exit status: input that cannot be used, or a loss that is not finite
LOST = 69  # EX_UNAVAILABLE: a process was lost, or nothing moves any more; run the same command again
INTERRUPTED = 130  # by Ctrl-C: as shells have it, 128 + SIGINT
REQUEUE = 75  # EX_TEMPFAIL: saved on SIGTERM or SIGINT; run the same command again


def is_main_process() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def num_cpus() -> int:
    """The cores that this process may use; where the system does not tell which (macOS), all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
