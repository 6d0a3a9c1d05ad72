"""Changes of the process that a block needs, undone at its end, so that a library leaves its caller alone."""

import contextlib
import logging
import os
import sys
import threading
import types

from absl import flags

_lock = threading.Lock()
_levels: dict[str, list[int]] = {}  # of each logger that is quiet: its own level, and how many blocks run


@contextlib.contextmanager
def quiet_loggers(*names: str, level: int = logging.CRITICAL):
    """In the block, loggers say nothing below `level`. Blocks of several threads may overlap.

    Args:
      names: of the loggers; 'root' for that of all.
      level: of the messages that still get through.
    """
    with _lock:
        for name in names:
            logger = logging.getLogger(name)
            _levels.setdefault(name, [logger.level, 0])[1] += 1
            logger.setLevel(level)
    try:
        yield
    finally:
        with _lock:
            for name in names:
                _levels[name][1] -= 1
                if not _levels[name][1]:
                    logging.getLogger(name).setLevel(_levels.pop(name)[0])


@contextlib.contextmanager
def no_progress_bars():
    """In the block, the package datasets shows none."""
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def no_prints(module: types.ModuleType):
    """In the block, what a module prints goes nowhere."""
    module.__dict__["print"] = lambda *_, **__: None
    try:
        yield
    finally:
        del module.__dict__["print"]


@contextlib.contextmanager
def environment(**defaults: str):
    """In the block, environment variables have these values, unless they have others."""
    added = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def modules(supplied: dict[str, types.ModuleType]):
    """In the block, modules can be imported by these names, unless others are there under them."""
    added = {name: module for name, module in supplied.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


@contextlib.contextmanager
def absl_flags_parsed():
    """In the block, absl's flags count as parsed: a package that asks for one of its own has its default, and
    does not read the arguments of whatever program this is."""
    if flags.FLAGS.is_parsed():
        yield
        return
    flags.FLAGS.mark_as_parsed()
    try:
        yield
    finally:
        flags.FLAGS.unparse_flags()
