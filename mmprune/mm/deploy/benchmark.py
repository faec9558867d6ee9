"""What one inference takes, unpruned and pruned in turns, by each way of running a model.

Both networks do the same work: the unpruned one has the pruned one's weights where they came from and
zeros where channels were removed, so both find the same, and post-processing costs both the same.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmprune.copies import copied
from mmprune.errors import PruneError
from mmprune.graph.slots import named_state
from mmprune.mm.checkpoint import load_pruned, without_pretrained
from mmprune.mm.deploy.export import wrapper_for
from mmprune.mm.deploy.raw import RawNetwork
from mmprune.mm.deploy.runtime import BACKENDS, open_model
from mmprune.surgery.fusion import fuse
from mmprune.surgery.plan import Plan, plan_of

MODES = ('eager', 'channels_last', 'compile', *BACKENDS)
CUDA_MODES = ('cuda eager', 'cuda channels_last', 'cuda compile')
WHICH = ('unpruned', 'pruned')
WARM_UP = 3


@dataclass(frozen=True)
class Job:
    """One network run in one way.

    ``which``: ``unpruned`` or ``pruned``. ``size``: height and width. ``raw``: without post-processing.
    ``files``: the exported files of both, for the backends that run files. ``threads``: of one run.
    """

    config: Config
    checkpoint: str
    size: tuple[int, int]
    batch: int
    threads: int = 1
    raw: bool = False
    mode: str = 'eager'
    which: str = 'pruned'
    files: dict[str, Path] | None = None


# -- the two networks -----------------------------------------------------------------------------


def load(job: Job) -> nn.Module:
    """The model of the job's checkpoint, as it is or as wide as it was."""
    pruned = load_pruned(job.config, job.checkpoint)
    if job.which == 'pruned':
        return pruned
    model = MODELS.build(without_pretrained(job.config.model)).eval()
    widen(model, pruned, plan_of(pruned))
    model.cfg, model.dataset_meta = pruned.cfg, pruned.dataset_meta
    return model


def widen(original: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Gives the unpruned model the pruned one's tensors, with zeros in the place of what was cut."""
    narrow = dict(named_state(pruned))
    with torch.no_grad():
        for name, tensor in named_state(original):
            kept = plan.keep.get(name, {})
            places = [torch.tensor(kept.get(d, range(size))) for d, size in enumerate(tensor.shape)]
            tensor.zero_()
            if places:
                tensor[torch.meshgrid(*places, indexing='ij')] = narrow[name]
            else:
                tensor.copy_(narrow[name])


def network_of(model: nn.Module, raw: bool) -> nn.Module:
    """What is measured, and what an exported file has in it: images in, detections or heatmaps out."""
    return (RawNetwork(model) if raw else wrapper_for(model)).eval()


def folded(model: nn.Module) -> nn.Module:
    """The model, changed in place to what is deployed: its batch norms are folded into convolutions, as
    every runtime does with a file."""
    with contextlib.suppress(PruneError):  # there may be none
        fuse(model)
    return model


def flops_of(model: nn.Module, size: tuple[int, int], raw: bool) -> int:
    """Multiply-adds for one image."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network_of(model, raw)(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


# -- one way of running it ------------------------------------------------------------------------


def ready(job: Job, model: nn.Module | None = None) -> Callable[[], Any]:
    """A function that does one inference on the job's batch, and returns when it is done.

    Args:
        model: the job's own, where it is loaded already.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(job.batch, 3, *job.size, generator=generator)
    if job.mode in BACKENDS:
        run, batch = open_model(job.files[job.which], job.mode, job.threads), images.numpy()
        return lambda: run(batch)
    torch.set_num_threads(job.threads)
    own = load(job) if model is None else copied(model)
    network = network_of(folded(own), job.raw)
    device, how = ('cuda', job.mode.removeprefix('cuda ')) if 'cuda' in job.mode else ('cpu', job.mode)
    network, images = network.to(device), images.to(device)
    if how == 'channels_last':
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if how == 'compile':
        network = torch.compile(network, dynamic=False)
    return lambda: _run(network, images)


@torch.inference_mode()
def _run(network: nn.Module, images: Tensor) -> Any:
    out = network(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return out


def in_turns(runs: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Milliseconds (rounds, number of ``runs``); each round has all of them, every second one in
    reverse order."""
    for run in list(runs) * WARM_UP:
        run()
    times = np.empty((rounds, len(runs)))
    for number in range(rounds):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for which in order:
            start = time.perf_counter()
            runs[which]()
            times[number, which] = (time.perf_counter() - start) * 1000
    return times


# -- memory ---------------------------------------------------------------------------------------


def peak_memory(job: Job) -> int | None:
    """Bytes that weights and runs add to a process of its own at their peak; for CUDA to the device.

    ``None`` where it can't be told: outside of Linux, and of compiled networks, whose compiler takes
    more than they do.
    """
    if 'compile' in job.mode or not Path('/proc/self/clear_refs').exists():
        return None
    # A server that has all imports, and has never had a model: its children start alike, at once.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory, job).result()


def _peak_memory(job: Job) -> int:
    if 'cuda' in job.mode:
        run = ready(job)
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    before = _memory('VmRSS')
    run = ready(job)
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc keeps what loading took, and runs would use it
        ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts again: without that of loading
    for _ in range(WARM_UP):
        run()
    return _memory('VmHWM') - before


def _memory(name: str) -> int:
    """A line of this process's status in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


# -- all of it ------------------------------------------------------------------------------------


def measure(job: Job, models: dict[str, nn.Module], rounds: int, flops_ratio: float) -> dict[str, Any]:
    """The row of one mode and batch: times in ms, peaks in bytes, how much faster, and which share
    that is of what the FLOPs promise. Where ``torch.compile`` can't, ``failure`` says why."""
    jobs = [replace(job, which=which) for which in WHICH]
    row: dict[str, Any] = {'mode': job.mode, 'batch': job.batch}
    try:
        times = in_turns([ready(each, models[each.which]) for each in jobs], rounds)
    except PruneError:
        raise
    except Exception as error:  # the compiler may end with anything
        if 'compile' not in job.mode:
            raise
        lines = str(error).strip().splitlines() or ['']
        return row | {'failure': f'{type(error).__name__}: {lines[0][:200]}'}
    finally:
        torch._dynamo.reset()
    for column, each in enumerate(jobs):
        row[each.which] = {
            'median_ms': float(np.median(times[:, column])),
            'p95_ms': float(np.percentile(times[:, column], 95)),
            'peak_bytes': peak_memory(each),
        }
    # Of pairs, since what else runs on the machine slows both of a pair.
    row['time_ratio'] = float(np.median(times[:, 0] / times[:, 1]))
    row['of_flops_ratio'] = row['time_ratio'] / flops_ratio
    return row
