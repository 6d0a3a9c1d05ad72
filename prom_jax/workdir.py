"""A run's folder: whose it is, and writing into it without leaving halves behind."""

import json
import os
from pathlib import Path

from prom_jax.errors import UserError

# What may change between a run and its resumption, as it does not change the result.
MAY_CHANGE = ("mesh", "checkpoint", "export", "remat", "attention", "batch.accumulation", "eval.every")


def claim(workdir: Path, config: dict):
    """Makes the folder this configuration's.

    Raises:
      UserError: if it is another's; what differs is named.
    """
    path = workdir / "config.json"
    if path.exists():
        theirs = _flat(json.loads(path.read_text(encoding="utf-8")))
        for key, value in _flat(config).items():
            if theirs.get(key) != value and not key.startswith(MAY_CHANGE):
                raise UserError(
                    f"{workdir} holds a run with {key}={theirs.get(key)!r}, now {value!r}: give another "
                    "--workdir, or remove it to start afresh"
                )
    write_json(path, config)


def write_json(path: Path, content):
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _flat(tree: dict, prefix: str = "") -> dict:
    """A nested dict with dotted keys."""
    items = {}
    for key, value in tree.items():
        items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items
