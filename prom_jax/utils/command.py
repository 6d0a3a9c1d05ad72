"""What a command sets in its process, which is its own; commands alone call this."""

import _thread
import ctypes
import importlib.util
import io
import logging
import sys
import threading
import warnings


def quiet_libraries():
    """Keeps to themselves what libraries print of errors that they also raise.

    Orbax logs every file it touches; it, gcsfs and asyncio print the trace of each error that they raise.
    TensorStore logs one per abandoned chunk write, as an exception that cannot be raised.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for library in ("absl", "asyncio", "gcsfs", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


def _print_unraisable(unraisable):
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Ctrl-C came amid a callback, such as JAX's at garbage collection, which cannot raise: once more.
        threading.Timer(0.05, _thread.interrupt_main).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def print_anything():
    """Has characters that the terminal's encoding lacks, such as λ, printed as Python writes them, `\\u03bb`;
    otherwise the first one would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def import_tensorboard():
    """Imports tensorboardX without torch, which it would import for the name of a type: seconds.

    Only before the process has threads.
    """
    if "torch" in sys.modules or not importlib.util.find_spec("tensorboardX"):
        return
    sys.modules["torch"] = None
    try:
        importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h: M_TRIM_THRESHOLD and so on
_kept = False  # whether freed memory is kept


def keep_freed_memory():
    """Where there is no accelerator, keeps the memory of an update for the next one; before JAX has threads.

    glibc would give the system back what an update frees at its end, 1.5 GiB in the demo, and new pages of it
    cost the next update up to a tenth of its time.
    """
    global _kept
    libc = ctypes.CDLL(None)
    accelerators = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    if not accelerators and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_ARENA_MAX, 1)
        _kept = True


def trim_freed_memory():
    """Gives the system back what is free at the moment, where freed memory is kept.

    Evaluations and checkpoints leave it in pieces, each too small for the next update, which then takes a new
    block: a run of 3.5 GiB came to hold 8.9.
    """
    if _kept:
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory():
    """Ends `keep_freed_memory`, if a command began it.

    What an update frees is one block; where something small comes to lie in it, the next update needs another
    one as large. So a run can come to hold several times what it uses.
    """
    global _kept
    if _kept:
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**17)  # both as by default
        libc.mallopt(_MMAP_MAX, 2**16)
        _kept = False
