"""How much faster, and smaller in memory, a pruned model is than its unpruned one, on this machine.

    python tools/benchmark.py CONFIG CHECKPOINT [--size HEIGHT WIDTH] [--batch 1 8] [--threads 1]
        [--modes eager channels_last compile onnxruntime openvino] [--json FILE]

Whole networks with post-processing, both in turns, in single precision: as PyTorch runs them (eager,
channels_last, compiled), and as exported files in ONNX Runtime and OpenVINO. On a CUDA device too where
there is one.
"""

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmprune import PruneError
from mmprune.mm import cli
from mmprune.mm.deploy import benchmark, pipeline
from mmprune.mm.deploy.export import divisor_of, export_model
from mmprune.mm.deploy.pose import pose_wrapper
from mmprune.mm.deploy.runtime import open_model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Times a pruned model against its unpruned one.')
    parser.add_argument('config', type=cli.existing_file, help='the unpruned config')
    parser.add_argument('checkpoint', type=cli.checkpoint_file, help='a pruned checkpoint')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
        help="of the images (default: the size of the files, or of the config's test pipeline)",
    )  # fmt: skip
    parser.add_argument('--batch', type=positive, nargs='+', default=[1, 8], help='images a run')
    parser.add_argument('--threads', type=positive, default=1)
    parser.add_argument('--rounds', type=positive, default=30, help='runs of each, after warm-up')
    parser.add_argument(
        '--modes', nargs='+', choices=benchmark.MODES + benchmark.CUDA_MODES,
        help='ways to run it (default: all that this machine has)',
    )  # fmt: skip
    parser.add_argument(
        '--onnx', type=cli.existing_file, nargs=2, metavar=('UNPRUNED', 'PRUNED'),
        help='exported files (default: both are exported for the run)',
    )  # fmt: skip
    parser.add_argument('--raw', action='store_true', help='the head outputs, no post-processing')
    parser.add_argument('--json', metavar='FILE', help='write the figures here')
    return parser.parse_args()


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be an integer >= 1')
    return int(text)


def main() -> None:
    args = parse_args()
    if args.json and not Path(args.json).parent.is_dir():
        raise PruneError(f'--json {args.json}: there is no folder {Path(args.json).parent}')
    modes = args.modes or benchmark.MODES
    if torch.cuda.is_available() and not args.modes:
        modes += benchmark.CUDA_MODES
    cfg = Config.fromfile(args.config)
    job = benchmark.Job(cfg, args.checkpoint, (0, 0), 1, args.threads, args.raw)
    tell('building both networks')
    models = {'pruned': benchmark.load(job)}
    job = replace(job, size=size_of(args, cfg, models['pruned']))
    tell(f'images of {job.size[0]} x {job.size[1]} (height, width)')
    models['unpruned'] = benchmark.load(replace(job, which='unpruned'))
    flops = {which: benchmark.flops_of(models[which], job.size, job.raw) for which in benchmark.WHICH}
    report = about(args, job, models, flops)
    with tempfile.TemporaryDirectory() as scratch:
        if set(modes) & set(benchmark.BACKENDS):
            job = replace(job, files=exported(args, models, job, Path(scratch)))
        todo = [(batch, mode) for batch in args.batch for mode in modes]
        for number, (batch, mode) in enumerate(todo, 1):
            where = f'{number} of {len(todo)}: {mode}, batch {batch}'
            tell(where)
            each = replace(job, mode=mode, batch=batch)
            row = benchmark.measure(each, models, args.rounds, report['flops_ratio'])
            report['rows'].append(row)
            tell(f'{where}: {outcome(row)}')
    console = Console()
    console.width = max(console.width, 100)  # where it is no terminal it would be 80
    console.print(table(report))
    for row in report['rows']:
        if 'failure' in row:
            console.print(f'{row["mode"]}, batch {row["batch"]}: {row["failure"]}', markup=False)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + '\n')


def tell(text: str) -> None:
    """One line of progress, apart from the table: a run may take many minutes."""
    print(f'benchmark.py: {text}', file=sys.stderr, flush=True)


def outcome(row: dict[str, Any]) -> str:
    if 'failure' in row:
        return f'fails: {row["failure"]}'
    medians = ' to '.join(f'{row[which]["median_ms"]:.1f}' for which in benchmark.WHICH)
    return f'{medians} ms, {row["time_ratio"]:.2f} x as fast'


def size_of(args: argparse.Namespace, cfg: Config, model: torch.nn.Module) -> tuple[int, int]:
    """(height, width) of the images to run: what was asked for, what the files say, or what a picture
    becomes that fills the scale of the test pipeline. Sides are rounded up to what the model takes.

    Raises:
        PruneError: none of these names a size, or the files take another one.
    """
    pose = pose_wrapper(model)
    size = args.size or (pose.input_size if pose else None)
    for path in args.onnx or ():
        written = open_model(path).metadata
        fixed = written['input_size']
        size = size or pipeline.input_size(written)
        if fixed and tuple(fixed) != tuple(size):
            raise PruneError(f'{path}: takes {fixed} alone, not {list(size)}; export it with --dynamic')
    divisor = divisor_of(model, size or pipeline.size_in(cfg))
    about = {'input_size': pipeline.size_in(cfg), 'pad_divisor': divisor}
    size = size or pipeline.input_size(about | pipeline.describe(cfg, None))
    if size is None:
        raise PruneError(
            '--size: the test pipeline of the config names no size of images; give HEIGHT WIDTH'
        )
    height, width = (-(-side // divisor) * divisor for side in size)
    if (height, width) != tuple(size):
        tell(f'{size[0]} x {size[1]} is padded: the model takes multiples of {divisor}')
    return height, width


def exported(
    args: argparse.Namespace, models: dict[str, torch.nn.Module], job: benchmark.Job, folder: Path
) -> dict[str, Path]:
    """The files of both networks: those that were given, or new ones."""
    if args.onnx:
        return dict(zip(benchmark.WHICH, map(Path, args.onnx), strict=True))
    files = {}
    for which, model in models.items():
        tell(f'exporting the {which} network')
        path = folder / f'{which}.onnx'
        files[which] = export_model(model, path, raw=job.raw, size=job.size, check=())
    return files


def about(
    args: argparse.Namespace,
    job: benchmark.Job,
    models: dict[str, torch.nn.Module],
    flops: dict[str, int],
) -> dict[str, Any]:
    """What was measured where; the rows are still missing."""
    packages = ('torch', 'onnxruntime', 'openvino')
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
        'versions': {name: version(name) for name in packages},
        'flops': flops,
        'flops_ratio': flops['unpruned'] / flops['pruned'],
        'params': {
            which: sum(parameter.numel() for parameter in models[which].parameters())
            for which in benchmark.WHICH
        },
        'rows': [],
    }


def processor() -> str:
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> Table:
    """The figures for a person."""
    height, width = report['size']
    flops = report['flops']
    out = Table(
        title=f'{height} x {width}, {report["precision"]}, threads: {report["threads"]}, '
        f'{report["processor"]}',
        caption=f'FLOPs {flops["unpruned"]:,} to {flops["pruned"]:,}, {report["flops_ratio"]:.2f} '
        'times fewer: what a model is faster by is also given as a share of this. Times: median / 95th '
        'percentile in ms. Memory: the peak over that of the process without a model.',
        title_justify='left', caption_justify='left',
    )  # fmt: skip
    for name in ('batch', 'mode', *benchmark.WHICH, 'faster', 'of the FLOPs', 'memory in MB'):
        out.add_column(name, justify='left' if name == 'mode' else 'right', no_wrap=True)
    for row in report['rows']:
        if 'failure' in row:
            out.add_row(str(row['batch']), row['mode'], 'fails')
            continue
        times = (f'{row[w]["median_ms"]:.1f} / {row[w]["p95_ms"]:.1f}' for w in benchmark.WHICH)
        peaks = [row[which]['peak_bytes'] for which in benchmark.WHICH]
        memory = '' if None in peaks else ' to '.join(f'{peak / 1e6:.0f}' for peak in peaks)
        out.add_row(
            str(row['batch']), row['mode'], *times, f'{row["time_ratio"]:.2f} x',
            f'{row["of_flops_ratio"]:.0%}', memory,
        )  # fmt: skip
    return out


if __name__ == '__main__':
    cli.run(main)
