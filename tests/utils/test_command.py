"""What commands set in their process."""

import io
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from prom_jax.utils import command


def test_a_terminal_without_greek_letters_gets_their_codes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    command.print_anything()
    print("λ = 0.1", flush=True)
    assert terminal.buffer.getvalue() == b"\\u03bb = 0.1\n"


def test_an_interrupt_that_python_ignores_comes_again():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        command._print_unraisable(SimpleNamespace(exc_value=KeyboardInterrupt()))
        time.sleep(10)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def settings(monkeypatch):
    """What glibc's allocator was told, in order, of a machine without an accelerator."""
    told = []

    class Library:
        gnu_get_libc_version = None
        mallopt = staticmethod(lambda name, value: told.append((name, value)))
        malloc_trim = staticmethod(lambda padding: told.append(("trimmed", padding)))

    monkeypatch.setattr(command.ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "_kept", False)
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_given_back_only_where_it_was_kept(settings):
    command.return_freed_memory()
    command.trim_freed_memory()
    assert settings == []
    command.keep_freed_memory()
    kept = dict(settings)
    command.trim_freed_memory()
    assert settings.pop() == ("trimmed", 0)
    assert kept[command._MMAP_MAX] == 0
    command.return_freed_memory()
    command.return_freed_memory()
    given_back = dict(settings[len(kept) :])
    assert len(settings) == len(kept) + len(given_back)
    assert given_back[command._MMAP_MAX] > 0 < given_back[command._TRIM_THRESHOLD]
