"""Files of rows."""

import json

import pytest


@pytest.fixture
def jsonl(tmp_path):
    """Write rows as JSON lines; return the path as a source."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write
