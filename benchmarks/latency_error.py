"""How far the table of op timings is from the time that a pruned network really takes.

    python benchmarks/latency_error.py CONFIG ... [--size 320] [--keep 0.7 0.5 0.3] [--threads 1]
                                       [--latency 0.5] [--divisor 8] [--out latency.json]
                                       [--backends eager onnxruntime openvino]
                                       [--per memory] [--scores random] [--no-table]

Weights are random: times do not hang on them. For each network and fraction of FLOPs: the fraction of
time that the table predicts, and the one that is measured in turns with the unpruned network (median of
quotients), and by how much they differ. With ``--latency`` also what a budget of so much time gives;
with ``--no-table`` nothing is predicted, only measured.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mmprune
from mmprune import Budget
from mmprune.api import score_now
from mmprune.budget.choose import choose, device_divisor
from mmprune.budget.device import least_of
from mmprune.budget.latency import cut_copy, device_of, measure, ratio_of
from mmprune.budget.measured import choose_measured
from mmprune.mm.deploy.raw import prepare_raw
from mmprune.surgery.build import Baseline
from tools import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run_of(model: nn.Module, size: int) -> Callable[[nn.Module], Any]:
    """Inference without post-processing on one picture; of a two-stage detector backbone, neck, RPN and
    box head on as many fixed proposals as it takes."""
    picture = torch.randn(1, 3, size, size)

    def run(model: nn.Module) -> Any:
        if not hasattr(model, 'roi_head'):
            features = model.extract_feat(picture)
            head = getattr(model, 'bbox_head', None) or getattr(model, 'head', None)
            return head(features) if head is not None else features
        features = model.extract_feat(picture)
        boxes = torch.tensor([[0.0, 10.0, 10.0, 60.0, 60.0]])
        boxes = boxes.repeat(model.test_cfg['rpn']['max_per_img'], 1)
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
    parser.add_argument('--per', default='auto', help='what scores are set against')
    parser.add_argument('--scores', choices=['l2', 'random'], default='l2')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--backends', nargs='*', default=['eager', 'onnxruntime', 'openvino'])
    parser.add_argument('--no-table', action='store_true', help='predict nothing')
    parser.add_argument('--out', help='write the rows here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    print(
        '| network | runtime | asked for | FLOPs | predicted | measured | error |\n' + '|---' * 7 + '|'
    )
    for config in args.configs:
        for backend in args.backends:
            for row in rows_of(config, backend, args):
                rows.append(row)
                print(
                    f'| {row["network"]} | {row["backend"]} | {row["asked"]} | {row["flops"]:.3f} '
                    f'| {row.get("predicted", math.nan):.3f} | {row["measured"]:.3f} '
                    f'| {row.get("predicted", math.nan) / row["measured"] - 1:+.1%} |',
                    flush=True,
                )
                if args.out:
                    with open(args.out, 'w') as file:
                        json.dump(rows, file, indent=1)


def rows_of(config: str, backend: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Predicted and measured fractions of time of one network in one runtime; the first row is of the
    unpruned network, in milliseconds."""
    torch.manual_seed(0)
    model = zoo.build_model(zoo.load(config)).eval()
    name, forward = config.split('/')[-1].removesuffix('.py'), run_of(model, args.size)
    prepare = prepare_raw((args.size, args.size), backend)
    graph = mmprune.trace(model, forward)
    scores = score_now(graph, 'l2')
    if args.scores == 'random':
        scores = np.random.default_rng(0).random(graph.n_units)
    everything, device, table = np.ones(graph.n_units, dtype=bool), device_of(graph), None
    if not args.no_table:
        table = measure(
            model, forward, graph, backend,
            prepare=prepare, divisor=args.divisor or 'auto', scores=scores, per=args.per,
        )  # fmt: skip
    unpruned = prepare(model)

    def predicted(keep: np.ndarray, unit: float) -> dict[str, float]:
        return {'predicted': table(keep) / unit} if table is not None else {}

    about = dict(
        network=name,
        per=args.per,
        scores=args.scores,
        backend=backend,
        threads=args.threads,
        size=args.size,
    )
    again = least_of({0: unpruned}, device, 15)[0]
    yield (
        about
        | dict(asked='unpruned, ms', flops=1.0, measured=again * 1e3)
        | predicted(everything, 1e-3)
    )
    whole = table(everything) if table is not None else 1.0

    def row(asked: str, keep: np.ndarray) -> dict[str, Any]:
        flops = mmprune.graph.cost.flops(graph)(keep) / graph.flops
        real = ratio_of(prepare(cut_copy(model, graph, keep)), unpruned, device, 31)
        return about | dict(asked=asked, flops=flops, measured=real) | predicted(keep, whole)

    for fraction in args.keep:
        budget = Budget(keep_flops=fraction, divisor=args.divisor or 'auto', backend=backend)
        auto = device_divisor(graph, backend) if table is None else table.divisor
        keep = choose(graph, scores, budget, per=args.per, auto=auto)
        yield row(f'keep_flops={fraction}', keep)
    for fraction in args.latency:
        budget = Budget(latency=fraction, divisor=args.divisor or 'auto', backend=backend)
        keep, _ = choose_measured(
            model, forward, graph, scores, budget, Baseline(), per=args.per, prepare=prepare
        )
        yield row(f'latency={fraction}', keep)


if __name__ == '__main__':
    main()
