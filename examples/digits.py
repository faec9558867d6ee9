"""Pruning in a training loop of plain PyTorch: handwritten digits, 8 x 8 pixels.

    python examples/digits.py [--epochs 12] [--out digits.pth]

Trains a small network, and removes channels during the training until half of its FLOPs remain. Then
saves the network, and builds the pruned network again from nothing but the checkpoint.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mmprune


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.down = nn.Sequential(
            nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.BatchNorm2d(48), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(48, 48, 3, padding=1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.BatchNorm2d(48),
        )
        self.head = nn.Linear(48 * 16, 10)

    def forward(self, x):
        x = self.down(self.stem(x))
        x = F.relu(x + self.block(x))
        return self.head(x.flatten(1))


def to_loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model, data):
    """The fraction of correctly classified images, in evaluation mode."""
    model.eval()
    share = (model(data[0]).argmax(1) == data[1]).float().mean().item()
    model.train()
    return share


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--prune-freq', type=int, default=12)
    parser.add_argument('--prune-num', type=int, default=6)
    parser.add_argument('--keep-flops', type=float, default=0.5)
    parser.add_argument('--out', default='digits.pth')
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    pruner = mmprune.Pruner(model, keep_flops=options.keep_flops, min_channels=4, divisor=1)

    iteration = 0
    for epoch in range(options.epochs):
        for rows in torch.randperm(len(train[0])).split(64):
            batch = train[0][rows], train[1][rows]
            iteration += 1
            if epoch >= 2 and iteration % options.prune_freq == 0:
                removed = pruner.rebuild_model(batch, to_loss_fn, optimizer, options.prune_num)
                if removed.units:
                    print(f'epoch {epoch + 1}: {removed}')
                continue
            optimizer.zero_grad()
            to_loss_fn(model, batch).backward()
            optimizer.step()
        scheduler.step()
    pruner.close()

    before = accuracy(model, test)
    torch.save({'weights': model.state_dict(), 'structure': mmprune.save_model_def(model)}, options.out)

    checkpoint = torch.load(options.out, weights_only=True)
    fresh = mmprune.load_model_def(Net(), checkpoint)
    fresh.load_state_dict(checkpoint['weights'])
    after = accuracy(fresh, test)
    print(f'accuracy {before:.3f}, of the model built from the checkpoint {after:.3f}')
    return removed, before, after


if __name__ == '__main__':
    main()
