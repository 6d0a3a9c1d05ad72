"""What commands set in their process."""

import sys

import pytest

from prom_jax.utils import command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")


@pytest.fixture
def settings(monkeypatch):
    """What glibc's allocator was told, in order, of a machine without an accelerator."""
    told = []

    class Library:
        gnu_get_libc_version = None
        mallopt = staticmethod(lambda name, value: told.append((name, value)))

    monkeypatch.setattr(command.ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "_kept", False)
    return told


def test_freed_memory_is_given_back_only_where_it_was_kept(settings):
    command.return_freed_memory()
    assert settings == []
    command.keep_freed_memory()
    kept = dict(settings)
    assert kept[command._MMAP_MAX] == 0
    command.return_freed_memory()
    command.return_freed_memory()
    given_back = dict(settings[len(kept) :])
    assert len(settings) == len(kept) + len(given_back)
    assert given_back[command._MMAP_MAX] > 0 < given_back[command._TRIM_THRESHOLD]
