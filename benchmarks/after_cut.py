"""The loss right after some cuts, by what they were chosen with: a minute a row, before a study.

    python benchmarks/after_cut.py CONFIG CHECKPOINT [--scores taylor/work fisher/work taylor2/work]
                                   [--keep 0.5] [--cuts 5] [--batches 6] [--seeds 3]

A score is NAME/PER: a criterion and what its numbers are set against. Units are scored anew before each
cut, on other batches of the config's training data; the loss is that of eight more, in training mode,
without any step of an optimizer: how much it rises, with each seed's own batches. Nothing is written.
"""

import argparse
import itertools
from statistics import mean
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mmprune
from mmprune.contexts import unchanged
from mmprune.copies import copied
from mmprune.mm.model_modes import loss_of, runs_of
from mmprune.score import make_score
from mmprune.score.collector import Collector
from mmprune.session import CutContext, cut_once

HELD_OUT = 8


def loss_on(model: nn.Module, batches: list[Any]) -> float:
    found = []
    with unchanged(model), torch.no_grad():
        for seed, batch in enumerate(batches):
            torch.manual_seed(seed)  # proposals are sampled
            found.append(float(model.parse_losses(loss_of(model, batch))[0]))
    return mean(found)


def cut(model: nn.Module, batches: list[Any], name: str, per: str, keep: float) -> None:
    """One cut to a fraction of the FLOPs that the model had at first."""
    runs = runs_of(model, batches[0], count=4)
    graph = mmprune.trace(model, runs.tensor, also=(runs.loss,))
    collector = Collector(graph, make_score(dict(name=name, per=per)), 'none', model)
    with unchanged(model):
        for batch in batches:
            model.zero_grad()
            model.parse_losses(loss_of(model, batch))[0].backward()
            collector.look()
    collector.close()
    model.zero_grad()
    budget = mmprune.Budget(keep_flops=keep, divisor=8)

    context = CutContext(model, per=per)
    cut_once(context, graph, collector.scores(), budget, runs.tensor, compensate=runs.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--scores', nargs='+', default=['taylor/work', 'fisher/work', 'taylor2/work'])
    parser.add_argument('--keep', type=float, default=0.5)
    parser.add_argument('--cuts', type=int, default=5)
    parser.add_argument('--batches', type=int, default=6, help='that each cut is scored on')
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.load_from, cfg.log_level, cfg.work_dir = args.checkpoint, 'ERROR', 'work_dirs/after_cut'
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    model = runner.model.train()
    rises: dict[str, list[float]] = {score: [] for score in args.scores}
    for seed in range(args.seeds):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=seed)
        again = itertools.chain.from_iterable(itertools.repeat(loader))
        batches = list(itertools.islice(again, args.batches * args.cuts + HELD_OUT))
        held_out = batches[-HELD_OUT:]
        before = loss_on(model, held_out)
        for score in track(args.scores, f'scores, seed {seed}'):
            torch.manual_seed(seed)
            pruned = copied(model).train()
            for number in range(1, args.cuts + 1):
                some = batches[args.batches * (number - 1) : args.batches * number]
                cut(pruned, some, *score.split('/'), 1 - (1 - args.keep) * number / args.cuts)
            rises[score].append(loss_on(pruned, held_out) - before)
    out = Table(title=f'{args.keep:.0%} of the FLOPs in {args.cuts} cuts', title_justify='left')
    for name in ('score', 'the loss rises by', 'by seed'):
        out.add_column(name)
    for score, found in rises.items():
        out.add_row(score, f'{mean(found):.3f}', ' '.join(f'{each:.3f}' for each in found))
    Console().print(out)


if __name__ == '__main__':
    main()
