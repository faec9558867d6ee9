"""Writes checkpoint files that are complete or absent, and finds the newest readable one."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mmprune.errors import PruneError

ATOMIC = dict(backend='mmprune_atomic')
"""``backend_args`` of mmengine's ``CheckpointHook`` that select :class:`AtomicBackend`."""

_NAMES = 'ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR ENAMETOOLONG'
"""The names in :mod:`errno` of the numbers in ``DISK``."""

DISK = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}
"""Error numbers of a disk that is full, failing or read-only."""

_outdated: list[str] = []
"""The files that are to be removed when the next file is written."""


@register_backend(ATOMIC['backend'])
class AtomicBackend(LocalBackend):
    """A file backend of mmengine that writes a temporary file beside the final one and renames it. A
    kill at any moment leaves either the old or the new content. ``remove`` only marks a file: it stays
    until the next file is written.

    mmengine's ``CheckpointHook`` removes the oldest checkpoint *before* it writes the next one. With
    ``max_keep_ckpts=1`` a kill between the two would lose both.
    """

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        try:
            replace_file(filepath, obj)
        except OSError as error:
            raise PruneError(
                f'{filepath}: could not be written: {error.strerror}; earlier checkpoints are kept: '
                'make room, and go on with --resume'
            ) from error
        outdated = [old for old in _outdated if old != str(filepath)]
        _outdated.clear()
        for old in outdated:
            Path(old).unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        _outdated.append(str(filepath))


def replace_file(path: str | Path, content: bytes | memoryview, sync: bool = True) -> Path:
    """Writes a file under another name, and renames it when it is complete. Makes missing folders.

    Args:
        path: the final path of the file.
        content: the new content of the file.
        sync: whether to wait until the disk has the file, so that it survives a loss of power. This may
            take a second. A file survives a kill of the process even without it.

    Returns:
        ``path``.

    Raises:
        OSError: the file could not be written. The old file is unchanged, and no temporary file is
            left.
    """
    path, new = Path(path), Path(f'{path}.new')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(new, 'wb') as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(new, path)
        if sync:
            sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    return path


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a loss of power, on systems that support it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems do not open folders
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def latest_readable(
    work_dir: str | Path, read: Callable[[str], dict], warn: Callable[[str], None]
) -> str | None:
    """Finds the checkpoint to resume from: the file that ``last_checkpoint`` names. If this file is
    damaged or missing, it is the newest readable file beside it that has the state of an optimizer.

    Args:
        work_dir: the folder in which the run wrote its files.
        read: reads a checkpoint, and raises a PruneError if it cannot.
        warn: called with a sentence about the files that could not be read, if another one was found.

    Returns:
        A path or a URL; ``None`` if there is no checkpoint.

    Raises:
        PruneError: there are checkpoints, but none of them can be read.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    named = note.read_text(errors='replace').strip() if note.is_file() else None
    if named and '://' in named:
        return named
    # An empty ``last_checkpoint`` was truncated. Without one, the run may have ended before it.
    folder = Path(named).parent if named and Path(named).parent.is_dir() else work_dir
    newest_first = sorted(folder.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True)
    troubles: list[str] = []
    for path in dict.fromkeys([*([named] if named else []), *map(str, newest_first)]):
        try:
            content = read(path)
        except PruneError as error:
            troubles.append(str(error))
            continue
        if path != named and 'optimizer' not in content:
            continue  # e.g. the best checkpoint, or a published one, from which no run can be resumed
        if troubles:
            warn(f'Resuming from {path}, since: ' + '; '.join(troubles))
        return path
    if troubles:
        raise PruneError(
            f'{work_dir}: no checkpoint in it can be read: {"; ".join(troubles)}. Start again without '
            '--resume, or give an earlier one: --resume FILE'
        )
    return None
