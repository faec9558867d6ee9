"""How far the table of op timings is from the time that a pruned network really takes.

    python benchmarks/latency_error.py CONFIG ... [--size 320] [--keep 0.7 0.5 0.3] [--threads 1]
                                       [--latency 0.5] [--divisor 8]

Weights are random: times do not hang on them. For each network and fraction of FLOPs: the fraction of
time that the table predicts, and the one that is measured in turns with the unpruned network (median of
quotients), and by how much they differ. With ``--latency`` also what a budget of so much time gives.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import mmprune
from mmprune import Budget
from mmprune.api import score_now
from mmprune.budget.choose import choose
from mmprune.budget.latency import choose_measured, measure, ratio_of, seconds_of
from mmprune.mm import zoo as testing
from mmprune.surgery.apply import cut
from mmprune.surgery.build import make_plan


def run_of(model: nn.Module, size: int) -> Callable[[nn.Module], Any]:
    """Inference without post-processing on one picture; of a two-stage detector backbone, neck, RPN and
    box head on 100 fixed proposals."""
    picture = torch.randn(1, 3, size, size)
    boxes = torch.tensor([[0.0, 10.0, 10.0, 60.0, 60.0]]).repeat(100, 1)

    def run(model: nn.Module) -> Any:
        if not hasattr(model, 'roi_head'):
            features = model.extract_feat(picture)
            head = getattr(model, 'bbox_head', None) or getattr(model, 'head', None)
            return head(features) if head is not None else features
        features = model.extract_feat(picture)
        roi = model.roi_head._bbox_forward(features, boxes)
        return model.rpn_head(features), roi['cls_score'], roi['bbox_pred']

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+')
    parser.add_argument('--size', type=int, default=320)
    parser.add_argument('--keep', type=float, nargs='*', default=[0.7, 0.5, 0.3])
    parser.add_argument('--latency', type=float, nargs='*', default=[])
    parser.add_argument('--divisor', type=int, default=None)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print('| network | asked for | FLOPs left | predicted | measured | error |\n' + '|---' * 6 + '|')
    for config in args.configs:
        model = testing.build_model(testing.load(config)).eval()
        name, forward = config.split('/')[-1].removesuffix('.py'), run_of(model, args.size)
        traced = mmprune.trace(model, forward)
        scores = score_now(traced, 'l2')
        table = measure(model, forward, traced, divisor=args.divisor)
        everything = np.ones(traced.n_units, dtype=bool)
        whole, rest = table(everything), table.rest

        def plan(keep, model=model, traced=traced):
            return make_plan(traced, model, keep, {})

        def report(asked, keep, real, traced=traced, name=name, table=table, whole=whole):
            flops = mmprune.graph.cost.flops(traced)(keep) / traced.flops
            predicted = table(keep) / whole
            print(
                f'| {name} | {asked} | {flops:.3f} | {predicted:.3f} | {real:.3f} '
                f'| {predicted / real - 1:+.1%} |',
                flush=True,
            )

        again = seconds_of(model, forward, 7)
        print(
            f'| {name} | unpruned, {again * 1e3:.1f} ms, {rest / whole:.0%} of it not in the table '
            f'| 1 | {whole * 1e3:.1f} ms | {again * 1e3:.1f} ms '
            f'| {whole / again - 1:+.1%} |'
        )
        for fraction in args.keep:
            budget = Budget(keep_flops=fraction, divisor=args.divisor or 'auto')
            keep = choose(traced, scores, budget, per='memory', auto=table.divisor)
            trial = copy.deepcopy(model)
            cut(trial, plan(keep))
            report(f'keep_flops={fraction}', keep, ratio_of(trial, model, forward, 21))
        for fraction in args.latency:
            budget = Budget(latency=fraction, divisor=args.divisor or 'auto')
            keep, _ = choose_measured(model, forward, traced, scores, budget, {}, plan)
            trial = copy.deepcopy(model)
            cut(trial, plan(keep))
            report(f'latency={fraction}', keep, ratio_of(trial, model, forward, 31))


if __name__ == '__main__':
    main()
