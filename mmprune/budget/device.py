"""Measures the channel multiple that is fast on a device, and times calls.

**Problem.** Processors compute channels in blocks. Where the block is 16, a layer of 33 channels takes
as long as one of 48, so a cut from 48 to 33 channels loses accuracy and gains nothing. The size of the
block depends on the device, the type of number and the runtime, and nothing reports it.

**Idea.** Time a 3 x 3 and a 1 x 1 convolution at every width from 33 to 96 channels, and fit a parabola
through all times: a device without blocks would take about as long. Then compare the times of the
multiples of 2, 4, 8, 16 and 32 with the parabola. If the best divisor takes at least 5 % less than all
widths do on average, the result is the smallest divisor that is as good (within 2 % of the parabola).
Otherwise the result is 1.

**Example.** Suppose that the multiples of 8 take 0.90 of the parabola on average, those of 16 and 32
take 0.89, those of 4 take 0.97, and all widths take 1.00. Then the result is 8.
"""

import contextlib
import ctypes
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmprune.budget.runtimes import convolution, runtime_versions
from mmprune.errors import PruneError

DIVISORS = (1, 2, 4, 8, 16, 32)
"""The divisors that are compared, in ascending order."""

WIDTHS = range(33, 97)
"""The numbers of channels at which convolutions are timed: two multiples of the largest divisor."""

DIVISORS_FILE = 'divisors.json'
"""The file in :func:`cache_folder` that holds {device, versions and data type: divisor}."""

ENVIRONMENT = 'MMPRUNE_CACHE'
"""The environment variable that names the folder where measurements are kept."""

log = logging.getLogger(__name__)

_divisors: dict[str, int] = {}
"""The divisors that this process measured, or read from the file or a checkpoint, by the same keys as
in the file."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The numbers of two options of ``mallopt``, as in malloc.h of glibc."""


def device_name(device: torch.device) -> str:
    """Returns the name of the processor or graphics card. The name of a CPU includes the instruction
    set and the number of threads that torch uses, because both change its times."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        lines = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
        name = lines[0] if lines else name
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


# -- the cache on disk -------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Returns ``$MMPRUNE_CACHE``, or else ``mmprune`` in the user's folder for caches."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen)
    base = os.environ.get('XDG_CACHE_HOME') or os.environ.get('LOCALAPPDATA')
    return Path(base or Path.home() / '.cache') / 'mmprune'


def read_divisors() -> dict[str, Any]:
    """Reads the divisors that earlier processes measured; empty without a readable file."""
    path = cache_folder() / DIVISORS_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning('%s can not be read (%s), so the divisors are measured again', path, error)
        return {}
    return content if isinstance(content, dict) else {}


def keep_divisor(key: str, divisor: int) -> None:
    """Adds a divisor to the file, or logs a warning if the folder cannot be written."""
    path = cache_folder() / DIVISORS_FILE
    unfinished = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = read_divisors() | {key: divisor}
        unfinished.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n')
        os.replace(unfinished, path)
    except OSError as error:
        log.warning('%s can not be written (%s), so the next run measures again', path, error)


# -- divisors ----------------------------------------------------------------------------------------


def divisor_of(device: torch.device, dtype: torch.dtype, backend: str = 'eager') -> int:
    """Returns the smallest of ``DIVISORS`` whose multiples are fast widths of convolutions; 1 if
    rounding widths would save no time.

    The first call measures the divisor, in about a second (longer in runtimes other than eager torch),
    and keeps it on disk.

    Raises:
        PruneError: the runtime is not installed.
    """
    type_name = str(dtype).removeprefix('torch.')
    key = f'{device_name(device)}, {runtime_versions(backend)}, {type_name}'
    if key not in _divisors:
        divisor = read_divisors().get(key)
        if divisor not in DIVISORS:
            divisor = _measured_divisor(key, device, dtype, backend)
        _divisors[key] = divisor
    return _divisors[key]


def _measured_divisor(key: str, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Measures a divisor and keeps it on disk. A failure only costs speed, so it is logged as a
    warning, and the divisor is 1."""
    try:
        divisor = best_divisor(times_by_width(device, dtype, backend))
    except PruneError:  # the user asked for a runtime that is not installed
        raise
    except Exception as error:
        log.warning(
            '%s: the fast channel multiple could not be measured (%s: %s), so widths are not rounded. '
            'Give divisor=8, say, to round them',
            key,
            type(error).__name__,
            error,
        )
        return 1
    keep_divisor(key, divisor)
    log.info('%s: multiples of %d channels are fast (measured)', key, divisor)
    return divisor


def known_divisors() -> dict[str, int]:
    """Returns the divisors that this process measured or read, by device, versions and data type, to be
    saved in a checkpoint."""
    return dict(_divisors)


def know_divisors(divisors: dict[str, int]) -> None:
    """Takes over the :func:`known_divisors` of a resumed run, so that its cuts keep the same steps even
    if a new measurement would give another divisor."""
    _divisors.update(divisors)


def times_by_width(
    device: torch.device, dtype: torch.dtype, backend: str = 'eager', rounds: int = 9
) -> dict[int, float]:
    """Times a 3 x 3 and a 1 x 1 convolution from ``width`` to ``width`` channels for each of
    ``WIDTHS``.

    Returns:
        {width: seconds of both convolutions in the fastest of ``rounds`` runs}.
    """
    side = 128 if device.type == 'cuda' else 28
    calls = {}
    for width in WIDTHS:
        x = torch.randn(1, width, side, side, device=device, dtype=dtype)
        runs = [convolution(x, torch.randn(width, width, k, k).to(x), backend) for k in (3, 1)]
        calls[width] = lambda runs=runs: [run() for run in runs]
    return least_of(calls, device, rounds)


def best_divisor(times: dict[int, float]) -> int:
    """Chooses the divisor by the idea at the top of this module.

    Args:
        times: {width: seconds}, as from :func:`times_by_width`.
    """
    widths = np.array(list(times), dtype=np.float64)
    seconds = np.array(list(times.values()))
    powers = np.stack([np.ones_like(widths), widths, widths**2], axis=1)
    # The fit minimises relative errors, so that narrow layers count as much as wide ones.
    parabola = powers @ np.linalg.lstsq(powers / seconds[:, None], np.ones_like(widths), rcond=None)[0]
    mean_ratio = {d: float(np.mean((seconds / parabola)[widths % d == 0])) for d in DIVISORS}
    lowest_ratio = min(mean_ratio.values())
    if lowest_ratio > 0.95 * mean_ratio[1]:
        return 1
    return next(divisor for divisor in DIVISORS if mean_ratio[divisor] <= lowest_ratio + 0.02)


# -- timing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def steady_memory() -> Iterator[None]:
    """Keeps freed memory inside glibc. Otherwise large activations may go back to the system after each
    run, depending on what the process allocated before, and the same network can be 25 % slower in
    another process. Does nothing on other systems."""
    library = ctypes.CDLL(None) if platform.system() == 'Linux' else None
    if library is None or not hasattr(library, 'mallopt'):
        yield
        return
    library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    try:
        yield
    finally:  # glibc adjusts the thresholds itself until they are set, up to these values
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        library.malloc_trim(0)


def least_of(
    calls: dict[Any, Callable[[], Any]], device: torch.device, rounds: int, in_a_row: int = 2
) -> dict[Any, float]:
    """Times calls, and returns {key: seconds of the fastest run}. The calls take turns, so that a
    machine that is slow for a while slows all of them.

    Args:
        calls: {key: the function that is timed}.
        device: the device on which the calls compute.
        rounds: the number of turns.
        in_a_row: the number of runs of one call in a turn, at least 2. The first run is not counted:
            the other calls have filled the caches with their data, and a deployed network runs alone.
    """
    fastest = dict.fromkeys(calls, float('inf'))
    with torch.no_grad(), steady_memory():
        for _ in range(rounds):
            for key, call in calls.items():
                times = [seconds_of_call(call, device) for _ in range(in_a_row)]
                fastest[key] = min(fastest[key], *times[1:])
    return fastest


def seconds_of_call(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds that one call takes until the device has computed its result."""
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
