"""What commands print: one console, and progress that suits a terminal as well as a log file."""

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# A notebook says that it is a terminal, and would keep every frame of a bar: it gets lines, as a log does.
_in_notebook = "ipykernel" in sys.modules
console = Console(
    highlight=False,
    markup=False,
    soft_wrap=True,
    force_jupyter=False,
    force_terminal=False if _in_notebook else None,
)
LINES = 20  # of progress in a log file, about


@contextlib.contextmanager
def progress(total: int, start: int = 0, what: str = "step"):
    """Gives a function (number, text) that shows how many of `what` are done and what the work reports."""
    if not console.is_terminal:
        interval = max(1, total // LINES)

        def line(number, text):
            if number % interval == 0 or number == total:
                console.print(f"{what:<4} {number:>5} of {total}  {text}")

        yield line
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=start, text="")

        def update(number, text):
            bar.update(task, completed=number, text=text)

        yield update


def track(items, what: str, total: int | None = None):
    """Goes through `items`, `total` of them, with a bar that is gone afterwards; in a log file, silently."""
    with Progress(transient=True, disable=not console.is_terminal, console=console) as bar:
        yield from bar.track(items, total=total, description=what)
