"""Trackio, on this machine or in a Space (TRACKIO_SPACE_ID). `trackio show --project=prom_jax` shows it."""

import contextlib
import io
from pathlib import Path

from prom_jax.training.trackers import Run
from prom_jax.utils.extras import needs

with needs("trackio"):
    import trackio


class Trackio:
    """A run of the project `prom_jax`, named by its work directory and id; the same one when it goes on."""

    repeats = False

    def __init__(self, run: Run):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to look at a dashboard
            self._run = trackio.init(
                project="prom_jax",
                name=f"{run.workdir.name}-{run.id}",
                config=run.settings,
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({name.replace("eval_", "eval/"): value for name, value in values.items()}, step=step)

    def text(self, name: str, markdown: str) -> None:
        self._run.log({name: trackio.Markdown(markdown)})

    def table(self, name: str, rows: list[dict]) -> None:
        self._run.log({name: trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        self._run.log({name: trackio.Image(path)})

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKER = Trackio
