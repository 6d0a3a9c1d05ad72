"""What a command sets in its process, which is its own; commands alone call this."""

import ctypes
import importlib.util
import logging
import sys


def quiet_libraries():
    """Keeps to themselves what libraries print of errors that they also raise.

    Orbax logs every file it touches; it and gcsfs print the trace of each error that they raise. TensorStore
    logs one per abandoned chunk write, as an exception that cannot be raised.
    """
    for library in ("absl", "gcsfs", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


def _print_unraisable(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def import_tensorboard():
    """Imports tensorboardX without torch, which it would import for the name of a type: seconds.

    Only before the process has threads.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None
    try:
        importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


def keep_freed_memory():
    """Where there is no accelerator, keeps the memory of an update for the next one; before JAX has threads.

    glibc would give the system back what an update frees at its end, 1.5 GiB in the demo, and new pages of it
    cost the next update up to a tenth of its time.
    """
    libc = ctypes.CDLL(None)
    accelerators = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    if not accelerators and hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h: M_TRIM_THRESHOLD and so on
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)
        libc.mallopt(arena_max, 1)
