"""TensorBoard: event files in the work directory. `tensorboard --logdir=runs` shows them."""

import json
from pathlib import Path

import numpy as np

from prom_jax.training.trackers import Run
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import environment

with needs("tensorboard"), environment(CRC32C_SW_MODE="auto"):  # which the package would leave set
    from tensorboardX import SummaryWriter  # imports torch where there is one: seconds


class TensorBoard:
    """Events after the step from which a run goes on are purged, and written again."""

    repeats = True

    def __init__(self, run: Run):
        # A killed run loses what is not flushed; two minutes of it by default.
        folder = str(run.workdir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=run.step + 1, flush_secs=1)
        self.text("settings", f"```\n{json.dumps(run.settings, indent=2, ensure_ascii=False)}\n```")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace("eval_", "eval/"), value, step)

    def text(self, name: str, markdown: str) -> None:
        self._writer.add_text(name, markdown)

    def table(self, name: str, rows: list[dict]) -> None:
        cells = [list(rows[0]), ["---"] * len(rows[0]), *([*map(str, row.values())] for row in rows)]
        lines = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in cells)
        self.text(name, "\n".join(f"| {line} |" for line in lines))

    def image(self, name: str, path: Path) -> None:
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as picture:
            pixels_HWC = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels_HWC, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


TRACKER = TensorBoard
