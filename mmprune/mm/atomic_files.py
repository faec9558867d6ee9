"""Checkpoint files that are whole or not there, and the newest that can be read."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from mmprune.errors import PruneError

ATOMIC = dict(backend='mmprune_atomic')
"""``backend_args`` for mmengine's ``CheckpointHook``: files by :class:`AtomicBackend`."""

DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip
"""What an operating system says of a disk that is full, failing or not to be written on."""

_outdated: list[str] = []


@register_backend(ATOMIC['backend'])
class AtomicBackend(LocalBackend):
    """Writes next to the file, then renames: at every moment the name stands for the old content or
    the new. What it is told to remove stays until the next file is written.

    mmengine's ``CheckpointHook`` removes the checkpoint that is one too many *before* it writes the
    next; with ``max_keep_ckpts=1`` a kill between the two would lose both.
    """

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        try:
            replace_file(filepath, obj)
        except OSError as error:
            raise PruneError(
                f'{filepath}: could not be written: {error.strerror}; the checkpoints of before stay: '
                'make room, and go on with --resume'
            ) from error
        outdated = [old for old in _outdated if old != str(filepath)]
        _outdated.clear()
        for old in outdated:
            Path(old).unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        _outdated.append(str(filepath))


def replace_file(path: str | Path, content: bytes | memoryview, sync: bool = True) -> Path:
    """Writes a file beside its name, and renames it when it is on the disk. Folders are made.

    Args:
        sync: wait for the disk, so that the new file outlasts a loss of power too. It may take a
            second; a kill alone loses nothing without it.

    Raises:
        OSError: nothing is left of the new file then, and the old one stays.
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
    """Makes a rename in ``folder`` outlast a loss of power, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # not everywhere may folders be opened
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def latest_readable(
    work_dir: str | Path, read: Callable[[str], dict], warn: Callable[[str], None]
) -> str | None:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names, or where that is truncated
    or gone the newest beside it that has an optimizer's state. ``None`` if there never was one.

    Args:
        work_dir: where the run wrote its files.
        read: reads a file, and raises a PruneError if it cannot.
        warn: gets what was passed over, as text.

    Raises:
        PruneError: there are checkpoints, and none can be read.
    """
    work_dir = Path(work_dir)
    note = work_dir / 'last_checkpoint'
    named = note.read_text(errors='replace').strip() if note.is_file() else None
    if named and '://' in named:
        return named
    # An empty note was truncated; with none at all, a run may have ended before it wrote its first.
    folder = Path(named).parent if named and Path(named).parent.is_dir() else work_dir
    others = sorted(folder.glob('*.pth'), key=lambda path: path.stat().st_mtime, reverse=True)
    troubles: list[str] = []
    for path in dict.fromkeys([*([named] if named else []), *map(str, others)]):
        try:
            content = read(path)
        except PruneError as error:
            troubles.append(str(error))
            continue
        if path != named and 'optimizer' not in content:
            continue  # the best one, or one that was published
        if troubles:
            warn(f'Resuming from {path}, since: ' + '; '.join(troubles))
        return path
    if troubles:
        raise PruneError(
            f'{work_dir}: no checkpoint in it can be read: '
            + '; '.join(troubles)
            + '. Start again without --resume, or give an earlier one: --resume FILE'
        )
    return None
