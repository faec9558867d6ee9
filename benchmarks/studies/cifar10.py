"""CIFAR-10: ResNet-56 cut to 1/2.1 of its FLOPs, by mmprune and by Torch-Pruning.

    OMP_NUM_THREADS=1 python benchmarks/studies/cifar10.py [--rows dense default ...] [--seeds 0 1 2]

Every row starts from the same trained weights and trains on the same batches at the same rates.
Pictures and weights: ``../shared/data/cifar10_jpg.zip``, ``../shared/weights/resnet56_cifar10.pth``
(``$MMPRUNE_CIFAR``, ``$MMPRUNE_WEIGHTS``). FLOPs of all rows are counted by ``mmprune.trace``.
"""

import argparse
import itertools
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mmprune
from benchmarks import study
from mmprune.budget.schedule import WINDOW, resolve, target_at

SHARED = study.ROOT.parent / 'shared'
DATA = Path(os.environ.get('MMPRUNE_CIFAR', SHARED / 'data' / 'cifar10_jpg.zip'))
WEIGHTS = Path(os.environ.get('MMPRUNE_WEIGHTS', SHARED / 'weights')) / 'resnet56_cifar10.pth'
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
KEEP, LR, WARM = 1 / 2.1, 0.02, 0.05
GATE = dict(score='taylor_gate')
OURS: dict[str, dict[str, Any]] = {
    'default': GATE,
    'ten': GATE | dict(steps=10),
    'oneshot': GATE | dict(steps=1),
    'oneshot_floor': GATE | dict(steps=1, keep_channels=0.4),
    'taylor': dict(score='taylor'),
    'second': dict(score='taylor2'),
    'oneshot_second': dict(score='taylor2', steps=1),
}
"""Options of the rows that mmprune cuts, over those of all; a single cut comes before training."""
ROWS = {
    'dense': 'not pruned',
    'default': "mmprune's default, widths not rounded",
    'ten': 'the same, 10 cuts',
    'oneshot': 'the same, one cut before training',
    'oneshot_floor': 'one cut before training, no group below 40 % of its channels',
    'taylor': 'by taylor',
    'second': 'by taylor2',
    'oneshot_second': 'by taylor2, one cut before training',
    'torch_pruning': 'Torch-Pruning (group norm), before training',
    'torch_pruning_sparse': 'Torch-Pruning behind sparse training',
}
STUDY = study.Study('cifar10', [study.Row(*row, '') for row in ROWS.items()], 'accuracy', 'accuracy')
SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=5e-4)
Pair = tuple[Any, Any]  # pictures and their classes


class Block(nn.Module):
    """Two convolutions. Where they widen, the shortcut is every other pixel, between channels of 0."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.zeros = (wide - narrow) // 2
        self.conv1 = nn.Conv2d(narrow, wide, 3, 2 if self.zeros else 1, padding=1, bias=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.zeros:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(x + y)


class ResNet56(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(9)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(8)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(8)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.linear(self.layer3(self.layer2(x)).mean((2, 3)))


def pictures(split: str, count: int, work_dir: Path) -> Pair:
    """(N, 32, 32, 3) bytes and (N,) classes, spread over a split; decoded once."""
    cache = work_dir / f'{split}_{count}.npz'
    if cache.is_file():
        return tuple(np.load(cache).values())
    with zipfile.ZipFile(DATA) as file:
        names = sorted(name for name in file.namelist() if name.startswith(f'{split}/'))
        classes = sorted({name.split('/')[1] for name in names})
        some = names[:: len(names) // count][:count]
        found = np.stack([np.asarray(Image.open(file.open(name)).convert('RGB')) for name in some])
    labels = np.array([classes.index(name.split('/')[1]) for name in some])
    work_dir.mkdir(parents=True, exist_ok=True)
    np.savez(cache, found, labels)
    return found, labels


def normalised(found: np.ndarray) -> Tensor:  # (N, H, W, 3) -> (N, 3, H, W), channels last in memory
    return ((torch.from_numpy(found).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def batches(data: Pair, size: int, seed: int) -> Iterator[Pair]:
    """Without end, shuffled in each epoch: cut out of a black frame of 4 pixels, half mirrored."""
    rng, (found, labels) = np.random.default_rng(seed), data
    while True:
        order = rng.permutation(len(labels))
        for rows in order[: len(order) // size * size].reshape(-1, size):
            framed = np.pad(found[rows], ((0, 0), (4, 4), (4, 4), (0, 0)))
            y, x = rng.integers(0, 9, (2, size, 1)) + np.arange(32)
            x = np.where(rng.random((size, 1)) < 0.5, x, x[:, ::-1])
            some = framed[np.arange(size)[:, None, None], y[:, :, None], x[:, None, :]]
            yield normalised(some), torch.from_numpy(labels[rows])


def loss_of(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    model.eval()
    found = [model(normalised(part)).argmax(1) for part in np.array_split(data[0], 40)]
    model.train()
    return float((torch.cat(found).numpy() == data[1]).mean())


def left_of(model: nn.Module) -> tuple[int, int]:  # FLOPs of one picture, parameters
    graph = mmprune.trace(model, lambda m: m(torch.zeros(1, 3, 32, 32)))
    return graph.flops, graph.params


def cut(pruner: mmprune.Pruner, keep: float, batch: Pair, optimizer: torch.optim.Optimizer) -> None:
    """To a fraction of the FLOPs, whatever number of units that takes."""
    pruner.limits = replace(pruner.limits, keep_flops=keep)
    pruner.rebuild_model(batch, loss_of, optimizer, prune_num=sys.maxsize)


def group_norm_pruner(model: ResNet56) -> Any:
    """Torch-Pruning's. It takes padding for elementwise and fails (an IndexError) where channels of
    the shortcuts may go, so the layers that make these are left out. ``reg`` is that of its scripts."""
    import torch_pruning as tp

    layers, x = dict(model.named_modules()), torch.zeros(1, 3, 32, 32)
    left_out = [layers[name] for name in layers if name in ('conv1', 'linear') or '.conv2' in name]
    options = dict(reg=5e-4, global_pruning=True, pruning_ratio=1.0, iterative_steps=400)
    score = tp.importance.GroupMagnitudeImportance()
    return tp.pruner.GroupNormPruner(model, x, score, ignored_layers=left_out, **options)


def step_down(pruner: Any, flops: float) -> None:
    """Torch-Pruning's steps, until no more FLOPs are left."""
    while left_of(pruner.model)[0] > flops and pruner.current_step < pruner.iterative_steps:
        pruner.step()


def train(name: str, seed: int, data: dict[str, Pair], args: Any) -> dict[str, Any]:
    """One row of one seed: what the study keeps of it."""
    told, total, sparse = f'{name}, seed {seed}', args.iterations, name == 'torch_pruning_sparse'
    model = ResNet56()
    model.load_state_dict(torch.load(WEIGHTS, map_location='cpu', weights_only=True))
    whole, fifth = left_of(model), round(WINDOW * total)
    options = dict(keep_flops=KEEP, divisor=1, compensate=True) | OURS.get(name, {})
    steps = options.pop('steps', None)
    # The hook's times by default, but for 30 cuts: so short a training has fewer by itself.
    times = resolve(None, None, None, steps or 30, False, total, None)
    if name in OURS:
        pruner = mmprune.Pruner(model, **options)
    elif name != 'dense':
        pruner = group_norm_pruner(model)
    oneshot = steps == 1
    many = name in OURS and not oneshot
    if oneshot:  # scored on batches from which nothing is learned: the rate is 0
        optimizer = SGD(model.parameters(), lr=0.0)
        for batch in itertools.islice(batches(data['train'], args.batch, seed), 20):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        cut(pruner, KEEP, batch, optimizer)
        pruner.close()
    if name == 'torch_pruning':
        step_down(pruner, KEEP * whole[0])
    optimizer, losses, curve = SGD(model.parameters()), [], {'0': accuracy(model, data['test'])}
    stream = itertools.islice(batches(data['train'], args.batch, seed), total)
    for now, batch in enumerate(track(stream, told, total), 1):
        done = now / total
        optimizer.param_groups[0]['lr'] = LR * min(done / WARM, (1 + np.cos(np.pi * done)) / 2)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if sparse and now <= fifth:
            pruner.regularize(model)
        optimizer.step()
        if sparse and now == fifth:
            step_down(pruner, KEEP * whole[0])
            optimizer = SGD(model.parameters())  # its parameters are new ones
        if many and now <= times.last and now % times.interval == 0:
            cut(pruner, target_at(now // times.interval, times.steps, KEEP), batch, optimizer)
            if now == times.last:
                pruner.close()
        losses.append(loss.item())
        if now % (total // args.epochs) == 0:
            found = curve[str(now)] = accuracy(model, data['test'])
            print(f'{told}, after {now}: loss {np.mean(losses):.3f}, accuracy {found:.4f}', flush=True)
            losses.clear()
    flops, params = (left / before for left, before in zip(left_of(model), whole, strict=True))
    return {'metric': found, 'flops': flops, 'params': params, 'curve': curve}


def main() -> None:
    parser = argparse.ArgumentParser(description='The study cifar10: see the head of its file.')
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS))
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/studies/cifar10'))
    parser.add_argument('--out', type=Path, help='JSON (default: docs/studies/, not with --short)')
    parser.add_argument('--short', action='store_true', help='a few iterations each: does it run?')
    parser.add_argument('--show', action='store_true', help='run nothing, show what there is')
    args = parser.parse_args()
    args.epochs, args.batch = (1, 8) if args.short else (args.epochs, 128)
    counts = dict(train=80, test=64) if args.short else dict(train=50_000, test=10_000)
    args.iterations = args.epochs * (counts['train'] // args.batch)
    out = args.out or (args.work_dir if args.short else study.DOCS / 'studies') / 'cifar10.json'
    before = json.loads(out.read_text())['rows'] if out.is_file() else []
    known = {row['name']: row['seeds'] for row in before}
    paths = {name: (args.work_dir / name).glob('*.json') for name in ROWS}
    done = {name: {path.stem: json.loads(path.read_text()) for path in paths[name]} for name in ROWS}
    runs = [run for seeds in (*known.values(), *done.values()) for run in seeds.values()]
    if any(max(map(int, run['curve'])) != args.iterations for run in runs):
        parser.error(f'{out} or {args.work_dir} is of other --epochs or --short: give those, or others')
    wanted = [(name, seed) for seed in args.seeds for name in args.rows if str(seed) not in done[name]]
    if wanted and not args.show:
        if not (WEIGHTS.is_file() and DATA.is_file()):
            parser.error(f'{WEIGHTS} and {DATA} are needed')
        if find_spec('torch_pruning') is None and any('torch_pruning' in name for name, _ in wanted):
            parser.error('rows of Torch-Pruning need it: pip install torch-pruning==1.6.1')
        data = {split: pictures(split, count, args.work_dir) for split, count in counts.items()}
        for name, seed in wanted:
            done[name][str(seed)] = found = train(name, seed, data, args)
            (args.work_dir / name).mkdir(parents=True, exist_ok=True)
            (args.work_dir / name / f'{seed}.json').write_text(json.dumps(found) + '\n')
    rows = [{'name': name, 'seeds': known.get(name, {}) | runs} for name, runs in done.items()]
    content = study.collect(STUDY, args.work_dir, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + '\n')
    study.show(study.table(content))
    if out.resolve().parent == study.DOCS / 'studies' and content['rows']:
        study.draw(content, out.with_suffix('.png'))
        page = study.DOCS / 'results.md'
        page.write_text(study.with_table(page.read_text(), content))


if __name__ == '__main__':
    main()
