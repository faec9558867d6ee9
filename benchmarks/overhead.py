"""What scoring, tracing and cutting cost.

    python benchmarks/overhead.py [--models resnet18 mobilenet_v2] [--size 224] [--batch 8]
                                  [--scores taylor fisher]
    python benchmarks/overhead.py --configs [CONFIG ...] [--threads 2] [--batch 2] [--out FILE.json]

The first prints, for each model, the time of a training step (forward, backward, SGD with momentum)
with each criterion as a ratio to the step without: both kinds of step take turns, and the median of
the ratios of neighbours counts, so that a busy machine does not tell. What still tells is the noise: by
how much two steps without differ (median); a ratio within it is none. Scoring costs by the weights, a
step by the images too: take the batch and size that are trained with. Then the time to trace and to
couple as a ratio to one forward, next to Torch-Pruning's building of its graph where that can be
imported.

The second takes configs of mmdet and mmpose (by default six) at the image size that they test at, a
process for each, and prints what the first cut of a training costs, part by part, in training steps
with the config's own optimizer (the median of those before and after), and the peak of memory over the
cut as a ratio to that over a step: of the process on a CPU, with all that it has loaded; of what torch
has allocated on a GPU. A later cut is not traced. On a CPU seconds are those of the processor, so that
what else runs on the machine tells little. Images and boxes are random, weights those of the config's
initialisation; a tenth of the FLOPs is cut by random scores.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mmprune.mm  # before torchvision, which on some machines imports only after it

import torchvision  # isort: skip
from mmprune.graph.coupling import couple
from mmprune.graph.tracer import trace_runs
from mmprune.score import CRITERIA
from mmprune.score.collector import Collector

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.zoo


def seconds(function, device, clock=time.perf_counter):
    start = clock()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return clock() - start


def steps(model, x, y, traced, scores, rounds, device):
    """({criterion: median ratio of a step with it to those beside it without}, seconds of a step
    without, median relative difference between two of those)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    seconds(step, device)
    found, plain, noise = {}, [], []
    for name in scores:
        ratios = []
        for _ in range(rounds):
            before = seconds(step, device)
            collector = Collector(traced, name, optimizer, model)
            if not ratios:
                seconds(step, device)  # the first one makes the index tensors
            ratio = seconds(step, device)
            collector.close()
            after = seconds(step, device)
            plain += [before, after]
            noise.append(abs(after - before) / before)
            ratios.append(ratio / ((before + after) / 2))
        found[name] = statistics.median(ratios)
    return found, statistics.median(plain), statistics.median(noise)


def graphs(model, x, rounds, device):
    """(forward, trace, couple, Torch-Pruning's graph) in seconds; the last may be a message."""
    forward = lambda model: model(x)  # noqa: E731

    def plain():
        with torch.no_grad():
            model(x)

    seconds(plain, device)
    forwards, traces, couples = [], [], []
    for _ in range(rounds):
        forwards.append(seconds(plain, device))
        kept = []
        traces.append(seconds(lambda kept=kept: kept.append(trace_runs(model, forward)), device))
        couples.append(seconds(lambda kept=kept: couple(kept[0]), device))
    try:
        import torch_pruning
    except ImportError:
        return *map(statistics.median, (forwards, traces, couples)), 'not installed'
    theirs = [
        seconds(lambda: torch_pruning.DependencyGraph().build_dependency(model, x), device)
        for _ in range(rounds)
    ]
    return tuple(map(statistics.median, (forwards, traces, couples, theirs)))


CONFIGS = (
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-m_8xb256-420e_coco-256x192.py',
    'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py',
)


class Peak:
    """Gigabytes: the most that was in use since the last :meth:`reset`."""

    def __init__(self, device):
        self.device = device

    def reset(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        else:
            Path('/proc/self/clear_refs').write_text('5')

    def read(self):
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated() / 1e9
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1e6


def batch_of(config, size, count):
    """Random images of ``size`` with what the config's loss needs."""
    from tools import zoo

    if config.get('default_scope') == 'mmpose':
        pairs = [zoo.pose_batch(config, seed) for seed in range(-(-count // 2))]
        return {key: [sample for pair in pairs for sample in pair[key]][:count] for key in pairs[0]}
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    masks = 'mask_head' in str(config.model)
    return demo_mm_inputs(count, (3, *size), num_items=[8] * count, num_classes=80, with_mask=masks)


def one_cut(name, count, device):
    """{part: seconds and peak}, of a step and of each part of a cut, for one config."""
    import numpy as np
    from mmengine.optim import build_optim_wrapper

    from mmprune.budget.budget import make_budget
    from mmprune.budget.choose import choose
    from mmprune.compensation import Compensation
    from mmprune.graph import carry
    from mmprune.mm import configs, model_modes
    from mmprune.session import check_cut
    from mmprune.surgery.apply import cut
    from mmprune.surgery.build import baseline_of, make_plan
    from tools import zoo

    config = zoo.load(name)
    size = configs.image_size(config)
    model = zoo.build_model(config).to(device)
    batch = batch_of(config, size, count)
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    peak, found = Peak(device), {}
    clock = time.process_time if device.type == 'cpu' else time.perf_counter

    def timed(part, function):
        peak.reset()
        result = []
        taken = seconds(lambda: result.append(function()), device, clock)
        found.setdefault(part, []).append((taken, peak.read()))
        print(f'  {part}: {taken:.2f} s, {found[part][-1][1]:.2f} GB', file=sys.stderr, flush=True)
        return result[0]

    def step():
        model.train_step(copy.deepcopy(batch), optimizer)

    budget = make_budget({'keep_flops': 0.9, 'divisor': 1})
    step()
    for _ in range(3):
        timed('step', step)
    runs = timed('batch', lambda: model_modes.runs_of(model, batch, size=size))
    traced, runs = timed('trace', lambda: model_modes.first_trace(model, runs))
    scores = np.random.default_rng(0).random(traced.n_units)
    whole = baseline_of(model, traced)
    keep = timed('choose', lambda: choose(traced, scores, budget, whole))
    plan = timed('plan', lambda: make_plan(traced, model, keep, budget.to_meta()))
    timed('check', lambda: check_cut(model, plan, runs.checked))
    made_up = timed('compensate', lambda: Compensation(model, traced, plan, runs.loss))
    timed('compensate', lambda: made_up.prepare([model]))
    timed('cut', lambda: cut(model, plan, optimizer))
    timed('compensate', made_up.apply)
    timed('carry', lambda: carry.after_cut(traced, model, keep))
    for _ in range(2):
        timed('step', step)
    return {'config': name, 'size': size, 'units': traced.n_units, 'parts': found}


PARTS = ('batch', 'trace', 'choose', 'plan', 'check', 'compensate', 'cut', 'carry')


def in_steps(found):
    """What :func:`one_cut` found: the median ``step`` in seconds and its ``memory`` in GB at most; each
    part, the ``first`` and a ``later`` cut in steps; the ``peak`` of a cut over that of a step."""
    step = statistics.median(taken for taken, _ in found['parts']['step'])
    memory = max(peak for _, peak in found['parts']['step'])
    taken = {part: sum(t for t, _ in found['parts'][part]) / step for part in PARTS}
    first = sum(taken.values())
    peak = max(read for part in PARTS for _, read in found['parts'][part]) / memory
    whole = dict(step=step, first=first, later=first - taken['trace'], memory=memory, peak=peak)
    return {name: round(value, 4) for name, value in (taken | whole).items()}


def row(found):
    """A line of the table, from what :func:`one_cut` found."""
    told = in_steps(found)
    cells = [
        Path(found['config']).stem,
        ' x '.join(map(str, found['size'])),
        f'{told["step"]:.2f} s',
        *(f'{told[part]:.2f}' for part in (*PARTS, 'first', 'later')),
        f'{told["memory"]:.2f} GB',
        f'{told["peak"]:.2f}',
    ]
    return f'| {" | ".join(cells)} |'


def cuts(options):
    """The table of cuts, a process for each config."""
    if options.child:
        print(json.dumps(one_cut(options.child, options.batch, torch.device(options.device))))
        return
    head = ['config', 'image', 'step', *PARTS, 'first cut', 'later cut', 'step, peak', 'cut, peak']
    print(f'| {" | ".join(head)} |\n|{"---|" * len(head)}', flush=True)
    rows = []
    for name in options.configs or CONFIGS:
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                '--child',
                name,
                '--batch',
                str(options.batch or 2),
                '--device',
                options.device,
                '--threads',
                str(options.threads),
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(row(rows[-1]), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(rows, indent=1) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'mobilenet_v2'])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, help='8, with --configs 2')
    parser.add_argument('--configs', nargs='*', help='what a cut costs')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--out', help='JSON of --configs')
    gradients = [name for name, criterion in CRITERIA.items() if criterion.gradients]
    parser.add_argument('--scores', nargs='+', default=gradients, choices=gradients)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.configs is not None or options.child:
        cuts(options)
        return
    options.batch = options.batch or 8
    device = torch.device(options.device)
    print(f'batch {options.batch}, {options.size} x {options.size} pixels, {device.type}\n')
    print(f'| model | step, ms | noise | {" | ".join(options.scores)} |')
    print('|---|---|---|' + '---|' * len(options.scores))
    built = {}
    for name in options.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(num_classes=10).to(device)
        x = torch.randn(options.batch, 3, options.size, options.size, device=device)
        y = torch.randint(10, (options.batch,), device=device)
        traced = mmprune.trace(model, lambda m, x=x: m(x))
        found, plain, noise = steps(model, x, y, traced, options.scores, options.rounds, device)
        ratios = ' | '.join(f'{ratio:.3f}' for ratio in found.values())
        print(f'| {name} | {plain * 1e3:.0f} | {noise:.3f} | {ratios} |', flush=True)
        built[name] = graphs(model, x, options.rounds, device)
    print('\n| model | forward, ms | trace | couple | both / forward | Torch-Pruning / forward |')
    print('|---|---|---|---|---|---|')
    for name, (forward, trace, couple_, theirs) in built.items():
        other = theirs if isinstance(theirs, str) else f'{theirs / forward:.2f}'
        print(
            f'| {name} | {forward * 1e3:.0f} | {trace * 1e3:.0f} ms | {couple_ * 1e3:.0f} ms '
            f'| {(trace + couple_) / forward:.2f} | {other} |'
        )


if __name__ == '__main__':
    main()
