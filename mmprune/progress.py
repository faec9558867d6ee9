"""Bars for what takes long; what is over soon shows none."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE = 2.0
"""Seconds after which something is said to take long."""

Tell = Callable[[float], None]
"""How much is done by now, in the unit of the bar's total."""


@contextlib.contextmanager
def bar(description: str, total: float, patience: float = PATIENCE) -> Iterator[Tell]:
    """A bar on the terminal, once ``patience`` seconds have passed; it is gone at the end. Where
    standard error is no terminal, or another bar is shown already, there is none."""
    console = Console(stderr=True)
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = shown.add_task(description, total=total)
    start, is_shown, is_refused = time.monotonic(), False, False

    def tell(done: float) -> None:
        nonlocal is_shown, is_refused
        if not is_shown and not is_refused and time.monotonic() - start >= patience:
            try:
                shown.start()
                is_shown = True
            except LiveError:  # older versions of rich show one at a time
                is_refused = True
        if is_shown:
            shown.update(task, completed=done)

    try:
        yield tell
    finally:
        if is_shown:
            shown.stop()
