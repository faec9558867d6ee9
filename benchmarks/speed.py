"""How much faster a pruned model is than its unpruned one, on this machine.

    python benchmarks/speed.py CONFIG CHECKPOINT [--size HEIGHT WIDTH] [--rounds 15] [--threads 1]

Both run in turns, so that a busy machine slows both. Of a two-stage detector: backbone, neck, RPN and
box head on 100 fixed proposals; of others ``mode='tensor'``. Post-processing is left out, and batch
norms are folded into convolutions on both sides, as one deploys them.
"""

import argparse
import statistics
import time

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import mmprune
from mmprune.checkpoint import without_pretrained


def run(model: nn.Module, picture: torch.Tensor, boxes: torch.Tensor) -> None:
    """One inference on ``picture`` (1, 3, H, W) and ``boxes`` (100, 5)."""
    if not hasattr(model, 'roi_head'):
        model(picture, mode='tensor')
        return
    features = model.extract_feat(picture)
    model.rpn_head(features)
    model.roi_head._bbox_forward(features, boxes)


def seconds(model: nn.Module, *inputs: torch.Tensor) -> float:
    start = time.perf_counter()
    run(model, *inputs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description='Times a pruned model against its unpruned one.')
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--size', type=int, nargs=2, default=(128, 128), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = Config.fromfile(args.config)
    pruned = mmprune.load_pruned(cfg, args.checkpoint, fuse=True)
    unpruned = mmprune.fuse(MODELS.build(without_pretrained(cfg.model)))
    picture = torch.randn(1, 3, *args.size)
    boxes = torch.tensor([[0.0, 10.0, 10.0, 60.0, 60.0]]).repeat(100, 1)
    with torch.no_grad():
        pairs = [(seconds(unpruned, picture, boxes), seconds(pruned, picture, boxes))
                 for _ in range(args.rounds + 2)][2:]  # fmt: skip
    before, after = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f'unpruned {before:.1f} ms, pruned {after:.1f} ms, {ratio:.2f} times as fast')


if __name__ == '__main__':
    main()
