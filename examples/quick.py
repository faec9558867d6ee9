"""The quickest way to see mmprune work: torch is all it needs, and it takes a minute on one core.

    python examples/quick.py [--out pruned.pt2]

The script trains a small residual network on drawn pictures, halves its FLOPs in a few cuts, trains on,
and exports the pruned network as one file that runs without this script.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import mmprune


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        Block(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def pictures(number, seed):
    """Draws discs, squares, rings and crosses of random sizes at random places, with noise.

    Returns pictures (number, 1, 32, 32) and their classes (number,).
    """
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    center = torch.rand(number, 2, 1, 1, generator=random) * 16 + 8
    radius = torch.rand(number, 1, 1, generator=random) * 4 + 4
    y = (torch.arange(32.0)[:, None] - center[:, 0]).abs()
    x = (torch.arange(32.0)[None] - center[:, 1]).abs()
    distance = (x.square() + y.square()).sqrt()
    inside = torch.maximum(x, y) < radius
    shapes = torch.stack(
        [
            distance < radius,
            inside,
            (distance < radius) & (distance > radius / 2),
            inside & (torch.minimum(x, y) < radius / 3),
        ]
    )
    drawn = shapes[labels, torch.arange(number)].float()
    return (drawn + 0.3 * torch.randn(drawn.shape, generator=random))[:, None], labels


def loss_of(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model, data):
    model.eval()
    right = (model(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train()
    return right


def milliseconds(model, images):
    """Returns the median time of a run."""
    model.eval()
    times = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[10]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default='pruned.pt2', help='the exported file')
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train, test = pictures(2048, seed=1), pictures(512, seed=2)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    pruner = mmprune.Pruner(model, keep_flops=0.5)
    time_before = milliseconds(model, test[0])

    for epoch in range(10):
        for rows in torch.randperm(len(train[0])).split(64):
            batch = train[0][rows], train[1][rows]
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        scheduler.step()
        print(f'epoch {epoch + 1}: accuracy {accuracy(model, test):.3f}')
        if 2 <= epoch <= 6:
            cut = pruner.rebuild_model(batch, loss_of, optimizer, prune_num=16)
            print(f'  {cut}')
    pruner.close()

    print(f'{time_before:.1f} ms before, {milliseconds(model, test[0]):.1f} ms after')
    exported = torch.export.export(model.eval(), (test[0][:1],))
    torch.export.save(exported, options.out)
    print(f'exported: {options.out}')


if __name__ == '__main__':
    main()
