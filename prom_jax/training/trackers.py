"""What a run reports: metrics.jsonl and TensorBoard, and the learning curves drawn from them."""

import json
from pathlib import Path

from prom_jax.utils.errors import UserError
from prom_jax.utils.process import is_main_process
from prom_jax.utils.temporary import environment


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and the same numbers to TensorBoard; other processes
    than 0 keep the rows in memory alone.

    Args: workdir; step: rows after it, and a torn last line, are removed: they will be made again.
    """

    def __init__(self, workdir: Path, step: int):
        path = Path(workdir) / "metrics.jsonl"
        self.rows = [row for row in read(path) if row["step"] <= step]
        self._file = self._board = None
        if not is_main_process():
            return
        with environment(CRC32C_SW_MODE="auto"):  # which the package would leave set
            from tensorboardX import SummaryWriter  # imports torch where there is one: seconds

        repaired = path.with_suffix(".partial")
        repaired.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        repaired.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict):
        """Adds a row."""
        row = {"step": step, **{key: float(value) for key, value in values.items()}}
        self.rows.append(row)
        if not self._file:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key.replace("eval_", "eval/"), value, step)

    def evaluation(self, step: int) -> dict | None:
        """The evaluation row of a step, if it was made."""
        rows = [row for row in self.rows if row["step"] == step and "loss" not in row]
        return rows[-1] if rows else None

    def close(self):
        """Flushes everything."""
        if self._file:
            self._file.close()
            self._board.close()


def read(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a torn last line is left out.

    Raises:
      UserError: if another line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: fix or remove the file") from error
    return rows
