"""Weights & Biases. Without a network: WANDB_MODE=offline; later `wandb sync runs/NAME/wandb/offline-*`."""

import html
from pathlib import Path

from prom_jax.training.trackers import Run
from prom_jax.utils.errors import UserError
from prom_jax.utils.extras import needs

with needs("wandb"):
    import wandb


class WeightsAndBiases:
    """A run of the project `prom_jax`, or of WANDB_PROJECT; the same one when it goes on."""

    repeats = False  # the service adds every row to those before

    def __init__(self, run: Run):
        settings = wandb.Settings(
            console="off",  # standard output is the command's
            silent=True,
            x_transaction_log_flush_interval=1.0,  # seconds that a killed run may lose: not 15
        )
        try:
            self._run = wandb.init(
                project=None if wandb.Settings().project else "prom_jax",
                name=run.workdir.name,
                id=run.id,
                resume="allow",
                dir=run.workdir,
                config=run.settings,
                allow_val_change=True,  # what may change when a run goes on
                settings=settings,
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb cannot be used ({error}): log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave it out of `trackers`"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        numbers = {name.replace("eval_", "eval/"): value for name, value in values.items()}
        self._run.log({"step": step, **numbers})

    def text(self, name: str, markdown: str) -> None:
        self._run.log({name: wandb.Html(f"<pre>{html.escape(markdown)}</pre>")})

    def table(self, name: str, rows: list[dict]) -> None:
        self._run.log({name: wandb.Table(list(rows[0]), [list(row.values()) for row in rows])})

    def image(self, name: str, path: Path) -> None:
        self._run.log({name: wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


TRACKER = WeightsAndBiases
