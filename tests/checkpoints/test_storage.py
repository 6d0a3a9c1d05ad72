"""Places on this machine and in an object store."""

import os

import pytest

from prom_jax.checkpoints.description import find
from prom_jax.checkpoints.storage import located
from prom_jax.utils.errors import UserError


def test_places():
    assert str(located("gs://bucket/run")) == "gs://bucket/run"
    assert str(located("runs/x")) == os.path.abspath("runs/x")
    with pytest.raises(UserError, match="in no place that is supported: expected a path or gs://bucket/…"):
        find("https://example.com/model")
    assert find("owner/name") is None
