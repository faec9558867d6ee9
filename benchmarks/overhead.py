"""What scoring and tracing cost.

    python benchmarks/overhead.py [--models resnet18 mobilenet_v2] [--size 224] [--batch 8]
                                  [--scores taylor fisher]

Prints, for each model, the time of a training step (forward, backward, SGD with momentum) with each
criterion as a ratio to the step without: both kinds of step take turns, and the median of the ratios
of neighbours counts, so that a busy machine does not tell. What still tells is the noise: by how much
two steps without differ (median); a ratio within it is none. Scoring costs by the weights, a step by
the images too: take the batch and size that are trained with. Then the time to trace and to couple as a
ratio to one forward, next to Torch-Pruning's building of its graph where that can be imported.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import mmprune  # before torchvision, which on some machines imports only after it

import torchvision  # isort: skip
from mmprune.couple import couple
from mmprune.score import CRITERIA
from mmprune.score.collector import Collector
from mmprune.trace import record


def seconds(function, device):
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
        traces.append(seconds(lambda kept=kept: kept.append(record(model, forward)), device))
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50', 'mobilenet_v2'])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=8)
    gradients = [name for name, criterion in CRITERIA.items() if criterion.gradients]
    parser.add_argument('--scores', nargs='+', default=gradients, choices=gradients)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
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
