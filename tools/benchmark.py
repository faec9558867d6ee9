"""Measures the time and the memory of a pruned model and of its unpruned one on this machine.

    python tools/benchmark.py CONFIG CHECKPOINT [--size HEIGHT WIDTH] [--batch 1 8] [--threads 1]
        [--modes eager channels_last compile onnxruntime openvino] [--json FILE]

Whole networks with post-processing run in single precision. Both networks take turns: in PyTorch
(eager, channels_last, compiled), and as exported files in ONNX Runtime and OpenVINO. If there is a CUDA
device, they also run on that device.

The unpruned network gets the weights of the pruned one, with zeros in place of the removed channels. So
both networks find the same objects, and their post-processing takes the same time.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmprune import PruneError
from mmprune.copies import copied
from mmprune.graph.slots import named_state
from mmprune.mm import cli
from mmprune.mm.checkpoint import load_pruned, without_pretrained
from mmprune.mm.configs import image_size
from mmprune.mm.deploy.export import divisor_of, export_model, flops_of, network_of
from mmprune.mm.deploy.onnx_file import BACKENDS, open_model
from mmprune.mm.deploy.pose_and_classifiers import pose_network
from mmprune.mm.deploy.raw import RawNetwork
from mmprune.surgery.fusion import fuse
from mmprune.surgery.plan import Plan, plan_of

MODES = ('eager', 'channels_last', 'compile', *BACKENDS)
"""The ways to run a network on the CPU."""

CUDA_MODES = ('cuda eager', 'cuda channels_last', 'cuda compile')
"""The ways to run a network on a CUDA device."""

VERSIONS = ('unpruned', 'pruned')
"""The two networks that are compared."""

WARM_UP = 3
"""The number of runs of each network before its runs are measured."""


@dataclass(frozen=True)
class Job:
    """One network, and one way to run it.

    Args:
        config: the config of the unpruned model.
        checkpoint: the path of the checkpoint of the pruned model.
        size: height and width of the images.
        batch: the number of images of one run.
        threads: the number of threads of one run.
        raw: whether post-processing is left out.
        mode: one of ``MODES`` or ``CUDA_MODES``.
        version: ``'unpruned'`` or ``'pruned'``.
        files: {version: exported file}, for the modes that run files; ``None`` for other modes.
    """

    config: Config
    checkpoint: str
    size: tuple[int, int]
    batch: int
    threads: int = 1
    raw: bool = False
    mode: str = 'eager'
    version: str = 'pruned'
    files: dict[str, Path] | None = None


# -- the two networks -----------------------------------------------------------------------------


def load(job: Job) -> nn.Module:
    """Loads the model of the job's checkpoint, pruned or with its unpruned widths."""
    pruned = load_pruned(job.config, job.checkpoint)
    if job.version == 'pruned':
        return pruned
    model = MODELS.build(without_pretrained(job.config.model)).eval()
    widen(model, pruned, plan_of(pruned))
    model.cfg, model.dataset_meta = pruned.cfg, pruned.dataset_meta
    return model


def widen(original: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Gives the unpruned model the pruned one's tensors, with zeros in the place of removed
    channels."""
    narrow = dict(named_state(pruned))
    with torch.no_grad():
        for name, tensor in named_state(original):
            kept_by_dim = plan.keep.get(name, {})
            indices = [
                torch.tensor(kept_by_dim.get(dim, range(size))) for dim, size in enumerate(tensor.shape)
            ]
            tensor.zero_()
            if indices:
                tensor[torch.meshgrid(*indices, indexing='ij')] = narrow[name]
            else:
                tensor.copy_(narrow[name])


def timed_network(model: nn.Module, raw: bool) -> nn.Module:
    """Returns the network that an exported file contains, with post-processing unless ``raw`` is
    set."""
    return (RawNetwork(model) if raw else network_of(model)).eval()


def folded(model: nn.Module) -> nn.Module:
    """Folds batch norms into convolutions, as every runtime does, and returns the model, which is
    changed in place."""
    with contextlib.suppress(PruneError):  # the model may have no batch norm to fold
        fuse(model)
    return model


# -- measuring one way to run a network -----------------------------------------------------------


def ready(job: Job, model: nn.Module | None = None) -> Callable[[], Any]:
    """Returns a function that runs the job's batch once, and that returns when the run is done.
    ``model`` is the job's model, or ``None`` to load it. A given model is copied."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(job.batch, 3, *job.size, generator=generator)
    if job.mode in BACKENDS:
        file, batch = open_model(job.files[job.version], job.mode, job.threads), images.numpy()
        return lambda: file(batch)
    torch.set_num_threads(job.threads)
    network = timed_network(folded(load(job) if model is None else copied(model)), job.raw)
    device, variant = (
        ('cuda', job.mode.removeprefix('cuda ')) if 'cuda' in job.mode else ('cpu', job.mode)
    )
    network, images = network.to(device), images.to(device)
    if variant == 'channels_last':
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if variant == 'compile':
        network = torch.compile(network, dynamic=False)
    return lambda: _run(network, images)


@torch.inference_mode()
def _run(network: nn.Module, images: Tensor) -> Any:
    """Runs the network, and waits until a CUDA device has finished."""
    outputs = network(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return outputs


def in_turns(runs: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Times runs in turns. Returns milliseconds (rounds, number of runs). Every second round has the
    reverse order."""
    for run in list(runs) * WARM_UP:
        run()
    times = np.empty((rounds, len(runs)))
    for round_index in range(rounds):
        order = range(len(runs)) if round_index % 2 else reversed(range(len(runs)))
        for column in order:
            start = time.perf_counter()
            runs[column]()
            times[round_index, column] = (time.perf_counter() - start) * 1000
    return times


def peak_memory(job: Job) -> int | None:
    """Measures how many bytes weights and runs add at their peak to a process that does nothing else;
    for CUDA, to the device. Returns ``None`` if that cannot be measured: outside Linux, and for
    compiled networks, whose compiler takes more memory than they do."""
    if 'compile' in job.mode or not Path('/proc/self/clear_refs').exists():
        return None
    # Each measurement runs in a child of a server process. The server has imported everything, but has
    # never loaded a model, so the memory of all its children is the same at the start.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmprune.mm.deploy.export'])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory, job).result()


def _peak_memory(job: Job) -> int:
    """Measures the peak memory of a job in this process, which must not have loaded a model before."""
    if 'cuda' in job.mode:
        run = ready(job)
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    before = _memory('VmRSS')
    run = ready(job)
    gc.collect()
    # glibc keeps memory that loading has freed. Runs would use it, and the peak would not show them.
    # Other C libraries have no ``malloc_trim``.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # Resets ``VmHWM``, the peak, which loading has raised.
    Path('/proc/self/clear_refs').write_text('5')
    for _ in range(WARM_UP):
        run()
    return _memory('VmHWM') - before


def _memory(name: str) -> int:
    """Reads a line of this process's status, such as ``VmRSS``, in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(job: Job, models: dict[str, nn.Module], rounds: int, flops_ratio: float) -> dict[str, Any]:
    """Measures one mode and batch. The row has times in ms, peaks in bytes, how many times faster the
    pruned network is, and this factor divided by the factor by which its FLOPs are fewer. If
    ``torch.compile`` fails, the row has ``failure`` instead."""
    jobs = [replace(job, version=version) for version in VERSIONS]
    row: dict[str, Any] = {'mode': job.mode, 'batch': job.batch}
    try:
        times = in_turns([ready(job, models[job.version]) for job in jobs], rounds)
    except PruneError:
        raise
    except Exception as error:  # the compiler may raise anything
        if 'compile' not in job.mode:
            raise
        lines = str(error).strip().splitlines() or ['']
        return row | {'failure': f'{type(error).__name__}: {lines[0][:200]}'}
    finally:
        torch._dynamo.reset()
    for column, job in enumerate(jobs):
        row[job.version] = {
            'median_ms': float(np.median(times[:, column])),
            'p95_ms': float(np.percentile(times[:, column], 95)),
            'peak_bytes': peak_memory(job),
        }
    # The ratio is the median over rounds of the ratio in a round, since other work on the machine slows
    # both runs of a round.
    row['time_ratio'] = float(np.median(times[:, 0] / times[:, 1]))
    row['of_flops_ratio'] = row['time_ratio'] / flops_ratio
    return row


# -- the command ----------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Times a pruned model against its unpruned one.')
    add = parser.add_argument
    add('config', type=cli.existing_file, help='the unpruned config')
    add('checkpoint', type=cli.checkpoint_file, help='a pruned checkpoint')
    size = "size of the images (default: the size of the files, or of the config's test pipeline)"
    add('--size', type=positive, nargs=2, metavar=('HEIGHT', 'WIDTH'), help=size)
    add('--batch', type=positive, nargs='+', default=[1, 8], help='images of one run')
    add('--threads', type=positive, default=1)
    add('--rounds', type=positive, default=30, help='runs of each network, after warm-up')
    modes = 'ways to run the networks (default: all that this machine has)'
    add('--modes', nargs='+', choices=MODES + CUDA_MODES, help=modes)
    files = 'exported files (default: both networks are exported for the run)'
    add('--onnx', type=cli.existing_file, nargs=2, metavar=('UNPRUNED', 'PRUNED'), help=files)
    add('--raw', action='store_true', help="the head's outputs, without post-processing")
    add('--json', metavar='FILE', help='write the figures here')
    return parser.parse_args()


def positive(text: str) -> int:
    """Parses an integer of at least 1, as an argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be an integer >= 1')
    return int(text)


def main() -> None:
    args = parse_args()
    if args.json and not Path(args.json).parent.is_dir():
        raise PruneError(f'--json {args.json}: there is no folder {Path(args.json).parent}')
    modes = args.modes or (MODES + CUDA_MODES if torch.cuda.is_available() else MODES)
    cfg = Config.fromfile(args.config)
    job = Job(cfg, args.checkpoint, (0, 0), 1, args.threads, args.raw)
    show('building both networks')
    models = {'pruned': load(job)}
    job = replace(job, size=size_of(args, cfg, models['pruned']))
    show(f'images of {job.size[0]} x {job.size[1]} (height, width)')
    models['unpruned'] = load(replace(job, version='unpruned'))
    report = header(args, job, models)
    with tempfile.TemporaryDirectory() as scratch:
        if set(modes) & set(BACKENDS):
            job = replace(job, files=exported(args, models, job, Path(scratch)))
        steps = [(batch, mode) for batch in args.batch for mode in modes]
        for number, (batch, mode) in enumerate(steps, 1):
            step = f'{number} of {len(steps)}: {mode}, batch {batch}'
            show(step)
            row = measure(
                replace(job, mode=mode, batch=batch), models, args.rounds, report['flops_ratio']
            )
            report['rows'].append(row)
            show(f'{step}: {outcome(row)}')
    console = Console()
    console.width = max(console.width, 100)  # rich assumes 80 if the output is not a terminal
    console.print(table(report))
    for row in report['rows']:
        if 'failure' in row:
            console.print(f'{row["mode"]}, batch {row["batch"]}: {row["failure"]}', markup=False)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + '\n')


def show(text: str) -> None:
    """Prints a line of progress to standard error: a run may take many minutes."""
    print(f'benchmark.py: {text}', file=sys.stderr, flush=True)


def outcome(row: dict[str, Any]) -> str:
    """Formats a row as a line of progress."""
    if 'failure' in row:
        return f'fails: {row["failure"]}'
    medians = ' to '.join(f'{row[version]["median_ms"]:.1f}' for version in VERSIONS)
    return f'{medians} ms, {row["time_ratio"]:.2f} x as fast'


def size_of(args: argparse.Namespace, cfg: Config, model: nn.Module) -> tuple[int, int]:
    """Returns (height, width) of the images: ``--size``, or the size of the files, or that of the test
    pipeline. Sides are rounded up to what the model takes.

    Raises:
        PruneError: no size is known, or the files take images of another size.
    """
    pose = pose_network(model)
    size = args.size or (pose.input_size if pose else None)
    for path in args.onnx or ():
        written = open_model(path).metadata
        fixed, scale = written['input_size'], (written.get('resize') or {}).get('scale')
        # The first known size is used: the requested one, that of the file, or the scale (width,
        # height) to which its pictures are resized.
        size = size or fixed or (scale and rounded(scale[::-1], written['pad_divisor']))
        if fixed and tuple(fixed) != tuple(size):
            raise PruneError(f'{path}: takes {fixed} alone, not {list(size)}; export it with --dynamic')
    divisor = divisor_of(model, size or image_size(cfg, only_fixed=True))
    size = size or image_size(cfg)
    if size is None:
        raise PruneError(
            '--size: the test pipeline of the config names no size of images; give HEIGHT WIDTH'
        )
    if rounded(size, divisor) != tuple(size):
        show(f'{size[0]} x {size[1]} is padded: the model takes multiples of {divisor}')
    return rounded(size, divisor)


def rounded(size: Sequence[int], divisor: int) -> tuple[int, ...]:
    """Rounds the sides up to multiples of ``divisor``."""
    return tuple(-(-side // divisor) * divisor for side in size)  # ``-(-a // b)`` rounds up


def exported(
    args: argparse.Namespace, models: dict[str, nn.Module], job: Job, folder: Path
) -> dict[str, Path]:
    """Returns the files of both networks: those of ``--onnx``, or new ones."""
    if args.onnx:
        return dict(zip(VERSIONS, map(Path, args.onnx), strict=True))
    files = {}
    for name, model in models.items():
        show(f'exporting the {name} network')
        files[name] = export_model(model, folder / f'{name}.onnx', raw=job.raw, size=job.size, check=())
    return files


def header(args: argparse.Namespace, job: Job, models: dict[str, nn.Module]) -> dict[str, Any]:
    """Makes the report without its rows: what is measured, and where."""
    flops = {name: flops_of(timed_network(models[name], job.raw), job.size) for name in VERSIONS}
    return {
        'config': args.config,
        'checkpoint': args.checkpoint,
        'size': list(job.size),
        'post_processing': not job.raw,
        'threads': job.threads,
        'precision': 'float32',
        'rounds': args.rounds,
        'processor': processor(),
        'cuda': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        'versions': {name: version(name) for name in ('torch', 'onnxruntime', 'openvino')},
        'flops': flops,
        'flops_ratio': flops['unpruned'] / flops['pruned'],
        'params': {
            name: sum(parameter.numel() for parameter in models[name].parameters()) for name in VERSIONS
        },
        'rows': [],
    }


def processor() -> str:
    """Returns the name of the processor."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> Table:
    """Makes a table of the report for the terminal."""
    height, width = report['size']
    flops = report['flops']
    title = f'{height} x {width}, float32, threads: {report["threads"]}, {report["processor"]}'
    caption = (
        f'FLOPs {flops["unpruned"]:,} to {flops["pruned"]:,}, {report["flops_ratio"]:.2f} times fewer. '
        '"of the FLOPs" is the gain in time as a share of this factor. Times: median / 95th percentile '
        'in ms. Memory: the peak above that of the process without a model.'
    )
    rich_table = Table(title=title, caption=caption, title_justify='left', caption_justify='left')
    for name in ('batch', 'mode', *VERSIONS, 'faster', 'of the FLOPs', 'memory in MB'):
        rich_table.add_column(name, justify='left' if name == 'mode' else 'right', no_wrap=True)
    for row in report['rows']:
        if 'failure' in row:
            rich_table.add_row(str(row['batch']), row['mode'], 'fails')
            continue
        times = (f'{row[name]["median_ms"]:.1f} / {row[name]["p95_ms"]:.1f}' for name in VERSIONS)
        peaks = [row[name]['peak_bytes'] for name in VERSIONS]
        memory = '' if None in peaks else ' to '.join(f'{peak / 1e6:.0f}' for peak in peaks)
        gain = (f'{row["time_ratio"]:.2f} x', f'{row["of_flops_ratio"]:.0%}')
        rich_table.add_row(str(row['batch']), row['mode'], *times, *gain, memory)
    return rich_table


if __name__ == '__main__':
    cli.run(main)
