"""What a device works in, measured once and kept on disk: the widths between are free."""

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
import torch.nn.functional as F

from mmprune.budget.runtimes import loaded, onnx_model, versions
from mmprune.errors import PruneError

DIVISORS = (1, 2, 4, 8, 16, 32)
WIDTHS = range(33, 97)
FILE = 'divisors.json'

ENVIRONMENT = 'MMPRUNE_CACHE'
"""The environment variable that names the folder where measurements are kept."""

log = logging.getLogger(__name__)

_divisors: dict[str, int] = {}

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of malloc.h."""


def device_name(device: torch.device) -> str:
    """The processor's or the card's own name, with the threads of a CPU: they change its times."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return device.type
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        lines = [line.split(':', 1)[1].strip() for line in file if line.startswith('model name')]
        name = lines[0] if lines else name
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def cache_folder() -> Path:
    """``$MMPRUNE_CACHE``, or ``mmprune`` in the user's folder for caches."""
    own = os.environ.get(ENVIRONMENT)
    if own:
        return Path(own)
    base = os.environ.get('XDG_CACHE_HOME') or os.environ.get('LOCALAPPDATA')
    return Path(base or Path.home() / '.cache') / 'mmprune'


def cached(file: str) -> dict[str, Any]:
    """What was kept under a name; nothing where it is not there or not to be read."""
    path = cache_folder() / file
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        told = f'{path} can not be read ({error}): it is measured again'
        log.warning(told)
        return {}
    return content if isinstance(content, dict) else {}


def keep_cached(file: str, new: dict[str, Any]) -> None:
    """Adds to what is kept under a name. Says so where the folder can not be written."""
    path = cache_folder() / file
    beside = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(cached(file) | new, indent=1, sort_keys=True) + '\n')
        os.replace(beside, path)
    except OSError as error:
        told = f'{path} can not be written ({error}): the next run measures again'
        log.warning(told)


def divisor_of(device: torch.device, dtype: torch.dtype, backend: str = 'eager') -> int:
    """The finest of ``DIVISORS`` that widths of convolutions should be multiples of on this device and
    in this runtime, so that none costs as much as a wider one; 1 where nothing is gained. Measured at
    the first call, in about a second (in other runtimes than eager torch some more), then kept."""
    key = f'{device_name(device)}, {versions(backend)}, {str(dtype).removeprefix("torch.")}'
    if key not in _divisors:
        known = cached(FILE).get(key)
        if known not in DIVISORS:
            known = _measured_divisor(key, device, dtype, backend)
        _divisors[key] = known
    return _divisors[key]


def _measured_divisor(key: str, device: torch.device, dtype: torch.dtype, backend: str) -> int:
    """Measures and keeps the divisor of ``key``. A measurement that fails costs speed alone, so it is
    a warning, and widths are free."""
    try:
        found = best_divisor(times_by_width(device, dtype, backend))
    except PruneError:  # a runtime that is not installed, which the user asked for
        raise
    except Exception as error:
        log.warning(
            '%s: the fast channel multiple could not be measured (%s: %s), so widths are not rounded. '
            'Give divisor=8, say, to round them', key, type(error).__name__, error,
        )  # fmt: skip
        return 1
    keep_cached(FILE, {key: found})
    log.info('%s: works in steps of %d channels (measured)', key, found)
    return found


def known_divisors() -> dict[str, int]:
    """What was measured or looked up so far, by device and type of number: for a checkpoint."""
    return dict(_divisors)


def know_divisors(divisors: dict[str, int]) -> None:
    """Takes :func:`known_divisors` of the run that is resumed, whatever would be measured now."""
    _divisors.update(divisors)


def times_by_width(
    device: torch.device, dtype: torch.dtype, backend: str = 'eager', rounds: int = 9
) -> dict[int, float]:
    """Seconds of a 3x3 and a 1x1 convolution of as many channels, {33 ... 96: seconds}."""
    side = 128 if device.type == 'cuda' else 28
    calls = {}
    for width in WIDTHS:
        x = torch.randn(1, width, side, side, device=device, dtype=dtype)
        runs = [convolution(x, torch.randn(width, width, k, k).to(x), backend) for k in (3, 1)]
        calls[width] = lambda runs=runs: [run() for run in runs]
    return least_of(calls, device, rounds)


def convolution(x: torch.Tensor, weight: torch.Tensor, backend: str) -> Callable[[], Any]:
    """A convolution of (N, C, H, W) that keeps height and width, ready to run in a backend."""
    padding = [weight.shape[-1] // 2] * 2
    if backend == 'eager':
        return lambda: F.conv2d(x, weight, padding=padding)
    values = dict(
        input=x, weight=weight, bias=None, stride=[1, 1], padding=padding, dilation=[1, 1],
        groups=1, transposed=False,
    )  # fmt: skip
    model, feed = onnx_model('aten::convolution', values)
    return loaded(model.SerializeToString(), feed, backend)


def best_divisor(times: dict[int, float]) -> int:
    """The finest of ``DIVISORS`` whose multiples are, by 2 % of the time, as fast as those of any.

    A parabola through all ``times`` (seconds by width) is what a machine without steps would need;
    multiples that take 5 % less at least are worth a restriction.
    """
    widths = np.array(list(times), dtype=np.float64)
    powers = np.stack([np.ones_like(widths), widths, widths**2], axis=1)
    seconds = np.array(list(times.values()))
    # Relative errors count: each width as much as the next.
    fit = powers @ np.linalg.lstsq(powers / seconds[:, None], np.ones_like(widths), rcond=None)[0]
    share = {d: float(np.mean((seconds / fit)[widths % d == 0])) for d in DIVISORS}
    least = min(share.values())
    if least > 0.95 * share[1]:
        return 1
    return next(divisor for divisor in DIVISORS if share[divisor] <= least + 0.02)


@contextlib.contextmanager
def steady_memory() -> Iterator[None]:
    """While it holds, glibc keeps what is freed. Else large activations are taken from the system and
    given
    back in each run, or are not, by what the process allocated before: with that the same network is a
    quarter slower in one process than in the next. Nothing on other systems."""
    library = ctypes.CDLL(None) if platform.system() == 'Linux' else None
    if library is None or not hasattr(library, 'mallopt'):
        yield
        return
    library.mallopt(TRIM_THRESHOLD, 1 << 30)
    library.mallopt(MMAP_THRESHOLD, 1 << 30)
    try:
        yield
    finally:  # where glibc's own adjustment ends that is off from now on
        library.mallopt(MMAP_THRESHOLD, 32 << 20)
        library.mallopt(TRIM_THRESHOLD, 64 << 20)
        library.malloc_trim(0)


def least_of(
    calls: dict[Any, Callable[[], Any]], device: torch.device, rounds: int, in_a_row: int = 2
) -> dict[Any, float]:
    """Seconds of the fastest run of each call, by turns: what slows the machine for a while slows all.

    Args:
        rounds: how many turns.
        in_a_row: runs of a turn, of which the first is left out: the call before has filled the caches
            with its own, and a network that is deployed runs alone.
    """
    found = dict.fromkeys(calls, float('inf'))
    with torch.no_grad(), steady_memory():
        for _ in range(rounds):
            for key, call in calls.items():
                times = [seconds_of_call(call, device) for _ in range(in_a_row)]
                found[key] = min(found[key], *times[1:])
    return found


def seconds_of_call(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
