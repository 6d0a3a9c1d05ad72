"""TensorBoard: event files in the work directory. `tensorboard --logdir=runs` shows them."""

import json
import time
from pathlib import Path

import numpy as np

from prom_jax.training.trackers import Run
from prom_jax.utils.extras import needs
from prom_jax.utils.temporary import environment
from prom_jax.utils.workdir import make_directory

with needs("tensorboard"), environment(CRC32C_SW_MODE="auto"):  # which the package would leave set
    from tensorboardX import summary  # imports torch where there is one: seconds
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class TensorBoard:
    """Events after the step from which a run goes on are purged, and written again.

    They are written at once, not by a thread as the package's SummaryWriter does: a full disk ends that
    thread, and the run would wait for it for ever.
    """

    repeats = True

    def __init__(self, run: Run):
        folder = run.workdir / "tensorboard"
        make_directory(folder)
        self._events = EventsWriter(str(folder / "events"))
        self._write(step=run.step + 1, session_log=SessionLog(status=SessionLog.START))
        self.text("settings", f"```\n{json.dumps(run.settings, indent=2, ensure_ascii=False)}\n```")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=summary.scalar(name.replace("eval_", "eval/"), value))

    def text(self, name: str, markdown: str) -> None:
        self._write(summary=summary.text(name, markdown))

    def table(self, name: str, rows: list[dict]) -> None:
        cells = [list(rows[0]), ["---"] * len(rows[0]), *([*map(str, row.values())] for row in rows)]
        lines = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in cells)
        self.text(name, "\n".join(f"| {line} |" for line in lines))

    def image(self, name: str, path: Path) -> None:
        from PIL import Image  # comes with matplotlib

        with Image.open(path) as picture:
            pixels_HWC = np.asarray(picture.convert("RGB"))
        self._write(summary=summary.image(name, pixels_HWC, dataformats="HWC"))

    def close(self) -> None:
        self._events.close()

    def _write(self, **event) -> None:
        self._events.write_event(Event(wall_time=time.time(), **event))
        self._events.flush()


TRACKER = TensorBoard
