"""Places on this machine and in an object store."""

import os

import pytest

from prom_jax.checkpoints.description import find
from prom_jax.checkpoints.storage import resolve_path
from prom_jax.utils.errors import UserError


def test_places():
    assert str(resolve_path("gs://bucket/run")) == "gs://bucket/run"
    assert str(resolve_path("runs/x")) == os.path.abspath("runs/x")
    with pytest.raises(UserError, match="in no place that is supported: expected a path or gs://bucket/…"):
        find("https://example.com/model")
    assert find("owner/name") is None
