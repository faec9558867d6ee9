"""How well each criterion ranks units by what their removal really costs.

    python benchmarks/oracle.py [--nets vgg alexnet faster_rcnn] [--seed 0] [--json oracle.json]

Trains small networks on the synthetic data, removes every unit by itself (zero at everything that
reads it) and notes the change of the loss, its absolute value: the oracle. Prints Spearman's rank
correlation of each criterion with it: within layers (mean over layers), across all layers, and
across layers after the scores of each layer were divided by their l2 norm: the table of Molchanov et
al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017. Data, loss
and mode (evaluation) are the same for oracle and scores.
"""

import argparse
import json
import logging
import os
import time
from dataclasses import replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

import mmprune
from mmprune.mm.demo import shapes
from mmprune.score import CRITERIA, Units, normalized
from mmprune.score.collector import Collector

SIDE = 32


def crops(root, split):
    """((N, 3, 32, 32) pictures of single shapes, (N,) classes)."""
    with open(root / 'annotations' / f'instances_{split}.json') as file:
        content = json.load(file)
    names = {image['id']: image['file_name'] for image in content['images']}
    found, labels = [], []
    for item in content['annotations']:
        picture = cv2.imread(str(root / split / names[item['image_id']]))
        x, y, w, h = item['bbox']
        if min(w, h) < 8:
            continue
        # With a margin and a shift, so that there is something to be learned.
        side, rng = 1.4 * max(w, h), np.random.default_rng(item['id'])
        dx, dy = rng.uniform(-0.15, 0.15, 2) * side
        corner = (x + w / 2 - side / 2 + dx, y + h / 2 - side / 2 + dy)
        matrix = np.float32(
            [[SIDE / side, 0, -corner[0] * SIDE / side], [0, SIDE / side, -corner[1] * SIDE / side]]
        )
        found.append(cv2.warpAffine(picture, matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT))
        labels.append(item['category_id'])
    kinds = sorted(set(labels))
    pictures = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 64 - 2
    return pictures, torch.tensor([kinds.index(label) for label in labels])


def vgg():
    layers, width = [], 3
    for out in (16, 16, 'M', 32, 32, 'M', 64, 64, 'M'):
        if out == 'M':
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 6))


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(24, 48, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(48, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 48, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Flatten(1),
        nn.Dropout(0.3),
        nn.Linear(48 * 16, 96),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(96, 6),
    )


def classifier(make, root, seed, epochs):
    """(trained model, batches, loss(model, batch), what it reaches)."""
    torch.manual_seed(seed)
    model = make()
    pictures, labels = crops(root, 'train')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = epochs * (len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64)[: len(labels) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        others, wanted = crops(root, 'val')
        right = (model(others).argmax(1) == wanted).float().mean()
    rows = torch.randperm(len(labels))[:512]
    batches = list(zip(pictures[rows].split(64), labels[rows].split(64), strict=True))
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return model, batches, loss, f'accuracy {right:.3f}'


def faster_rcnn(root, seed, iterations):
    from mmengine.config import Config
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS, MODELS, init_default_scope

    os.environ['MMPRUNE_SHAPES'] = str(root)
    logging.disable(logging.INFO)
    config = Config.fromfile('configs/_base_/faster_rcnn_shapes.py')
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = MODELS.build(config.model)
    model.init_weights()
    data = DATASETS.build(config.train_dataloader.dataset)

    def batch_of(rows):
        return model.data_preprocessor(pseudo_collate([data[int(i)] for i in rows]), True)

    def loss(model, batch):
        torch.manual_seed(0)  # the samplers of anchors and RoIs
        return model.parse_losses(model(**batch, mode='loss'))[0]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=iterations)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    last = []
    for _ in range(iterations):
        value = loss(model, batch_of(torch.randint(len(data), (4,), generator=generator)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()
        last = [*last[-50:], value.item()]
    model.eval()
    rows = torch.randperm(len(data), generator=generator)[:16]
    return model, [batch_of(r) for r in rows.split(4)], loss, f'loss {np.mean(last):.3f}'


@torch.no_grad()
def mean_loss(model, batches, loss):
    return float(np.mean([float(loss(model, batch)) for batch in batches]))


@torch.no_grad()
def oracle(model, units, chosen, batches, loss):
    """|change of the loss| without each of the ``chosen`` units: what reads it gets a zero."""
    whole = mean_loss(model, batches, loss)
    found = []
    for unit in chosen.tolist():
        kept = []
        for entry in units.consumers:
            at = torch.nonzero(entry.index == unit).flatten()
            if len(at):
                kept.append((entry, at, entry.weight.index_select(entry.axis.dim, at)))
                entry.weight.index_fill_(entry.axis.dim, at, 0)
        found.append(abs(mean_loss(model, batches, loss) - whole))
        for entry, at, values in kept:
            entry.weight.index_copy_(entry.axis.dim, at, values)
    return np.array(found)


def scores(model, traced, batches, loss):
    """{criterion: (n_units,) numbers as they are, without normalisation}."""
    nothing = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    torch.manual_seed(0)
    collectors = {}
    for name, criterion in CRITERIA.items():
        CRITERIA[name] = replace(criterion, normalize='none')
        collectors[name] = Collector(traced, name, nothing, model)
    for batch in batches:
        nothing.zero_grad()
        loss(model, batch).backward()
        nothing.step()
    found = {}
    for name, collector in collectors.items():
        collector.close()
        # Units without a norm have no scale: the average layer stands in, so that all are ranked.
        values = collector.scores() if name != 'bn_scale' or traced.scales else None
        if values is not None:
            found[name] = values
    return found


def table(traced, chosen, truth, found):
    """{criterion: (within layers, across, across after l2 normalisation)}."""
    rows = {}
    group_of = traced.group_of[chosen]
    for name, values in found.items():
        scored = np.isfinite(values[chosen])

        def rank(x, rows=slice(None), scored=scored):
            mask = scored[rows]
            return float(spearmanr(x[rows][mask], truth[rows][mask])[0])

        layers = []
        for number in np.unique(group_of):
            mine = np.flatnonzero((group_of == number) & scored)
            if len(mine) >= 8 and np.ptp(truth[mine]) > 0:
                layers.append(float(spearmanr(values[chosen][mine], truth[mine])[0]))
        normal = normalized(traced, values)[chosen]
        rows[name] = (float(np.mean(layers)), rank(values[chosen]), rank(normal), int(scored.sum()))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nets', nargs='+', default=['vgg', 'alexnet', 'faster_rcnn'])
    parser.add_argument('--data', default='data/shapes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=12, help='of the classifiers')
    parser.add_argument('--iterations', type=int, default=600, help='of the detector')
    parser.add_argument('--units', type=int, default=10, help="of each of the detector's groups")
    parser.add_argument('--json', help='where the figures go')
    options = parser.parse_args()
    root = shapes.ensure(options.data)
    results = {}
    for net in options.nets:
        start = time.perf_counter()
        if net == 'faster_rcnn':
            model, batches, loss, reached = faster_rcnn(root, options.seed, options.iterations)
        else:
            make = {'vgg': vgg, 'alexnet': alexnet}[net]
            model, batches, loss, reached = classifier(make, root, options.seed, options.epochs)
        traced = mmprune.trace(model, lambda m, loss=loss, batches=batches: loss(m, batches[0]))
        found = scores(model, traced, batches, loss)
        generator = np.random.default_rng(options.seed)
        chosen = np.arange(traced.n_units)
        if net == 'faster_rcnn':
            chosen = np.concatenate(
                [generator.permutation(group.units)[: options.units] for group in traced.groups]
            )
        truth = oracle(model, Units(traced), chosen, batches, loss)
        results[net] = table(traced, chosen, truth, found)
        print(
            f'\n{net} ({reached}; {len(chosen)} of {traced.n_units} units in {len(traced.groups)} '
            f'groups; {time.perf_counter() - start:.0f} s)\n\n'
            '| criterion | within layers | across | across, l2-normalised | units |\n'
            '|---|---|---|---|---|'
        )
        for name, row in sorted(results[net].items(), key=lambda item: -item[1][2]):
            print(f'| {name} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {row[3]} |', flush=True)
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(results, file, indent=1)


if __name__ == '__main__':
    main()
