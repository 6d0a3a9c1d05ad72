"""Which process of a run this is, for those who alone may write and print."""

import jax


def is_main_process() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
