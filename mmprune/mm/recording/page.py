"""The page of a run, or of several side by side."""

from collections.abc import Sequence
from pathlib import Path

from mmprune.mm import pages
from mmprune.mm.recording.reading import read_run
from mmprune.mm.recording.run_page import page_of
from mmprune.mm.recording.runs_page import comparison

FILE = 'report.html'


def write_page(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Makes the page of the runs in ``folders``, whatever state they are in.

    Args:
        out: the file; by default ``report.html``, of a single run in its folder.

    Raises:
        OSError: it could not be written.
    """
    runs = [read_run(folder) for folder in folders]
    page = page_of(runs[0]) if len(runs) == 1 else comparison(runs)
    return pages.write(page, out or (runs[0].folder / FILE if len(runs) == 1 else FILE))
