"""A progress bar for work that takes long; short work shows none."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE = 2.0
"""Seconds before a bar appears."""

Tell = Callable[[float], None]
"""Receives how much of the work is done, in the unit of the bar's total."""


@contextlib.contextmanager
def bar(description: str, total: float, patience: float = PATIENCE) -> Iterator[Tell]:
    """Shows a bar on the terminal once ``patience`` seconds have passed, and removes it at the end.
    There is no bar if standard error is not a terminal, or if another bar is shown already."""
    console = Console(stderr=True)
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task(description, total=total)
    start, is_shown, is_refused = time.monotonic(), False, False

    def tell(done: float) -> None:
        nonlocal is_shown, is_refused
        if not is_shown and not is_refused and time.monotonic() - start >= patience:
            try:
                progress.start()
                is_shown = True
            except LiveError:  # older versions of rich show one bar at a time
                is_refused = True
        if is_shown:
            progress.update(task, completed=done)

    try:
        yield tell
    finally:
        if is_shown:
            progress.stop()
