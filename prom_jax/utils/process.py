"""This process among others: which one it is, and with what status it ends."""

import jax

MISTAKE = 2  # exit status: input that cannot be used, or a loss that is not finite
LOST = 69  # EX_UNAVAILABLE: a process was lost, or nothing moves any more; run the same command again
REQUEUE = 75  # EX_TEMPFAIL: saved on SIGTERM or SIGINT; run the same command again


def is_main_process() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
