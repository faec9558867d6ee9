"""Cuts 30 % of every group of channels in one model of each family of the zoos, and checks the result.

    python tools/coverage.py                    # all families of tools/coverage.txt
    python tools/coverage.py --only 'mmdet/*r*' --jobs 2
    python tools/coverage.py --only mmdet/detr --reasons    # also print all locks

All families take about an hour on two cores. Each family runs in a separate process, with random
weights and without downloads. The results are merged into docs/coverage.json, from which
docs/coverage.md is made.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The root of the repository."""

sys.path.insert(0, str(ROOT))  # ``tools`` is not installed, so it is imported from here

FAMILIES = ROOT / 'tools' / 'coverage.txt'
"""The file with the config of each family."""

RESULTS = ROOT / 'docs' / 'coverage.json'
"""The file with a row of results for each family."""

PAGE = ROOT / 'docs' / 'coverage.md'
"""The page that is made from ``RESULTS``."""

TOLERANCE = 1e-5
"""The largest relative error, in single precision, at which a pruned model counts as exact."""

FORK = multiprocessing.get_context('fork')
"""Starts processes as copies of this one, which has imported everything."""


def families() -> dict[str, tuple[str, dict]]:
    """Reads the file of families: {'mmdet/atss': (config, further arguments of ``zoo.build``)}."""
    families, zoo = {}, ''
    for line in FAMILIES.read_text().splitlines():
        if line.startswith('['):
            zoo = line.strip('[] ')
        elif line.strip() and not line.startswith('#'):
            name, config, *options = line.split()
            arguments = dict(option.split('=') for option in options)
            if 'size' in arguments:
                arguments['size'] = int(arguments['size'])
            families[f'{zoo}/{name}'] = (config, arguments)
    return families


# -- one family, in a separate process ------------------------------------------------------------


def examine(config: str, arguments: dict, row: dict, done: Callable[[], None]) -> None:
    """Fills the row of one family.

    Args:
        config: the name of the config, as :func:`tools.zoo.build` takes it.
        arguments: further arguments of :func:`tools.zoo.build`.
        row: the row of the family, to which this function adds its results.
        done: a function that is called at the beginning of each stage, after the name of the stage was
            written to ``row['stage']``.
    """
    import torch

    import mmprune
    from mmprune.api import score_now
    from mmprune.contexts import one_after_another
    from mmprune.surgery.apply import cut
    from tools.zoo import build

    def at(stage: str) -> None:
        row['stage'] = stage
        done()

    at('build')
    model, forward = build(config, **arguments)
    runs = [forward]
    if not config.startswith('torchvision'):
        runs.append(lambda m: in_mode(m, 'predict', forward))
        with torch.no_grad():
            try:
                runs[1](copy.deepcopy(model))
            except Exception as error:  # the original model may fail for any reason
                row['note'] = f'the original predicts nothing here: {error}'[:200]
                runs.pop()
    with torch.no_grad():
        row['forward_s'] = timed(lambda: one_after_another(*runs)(copy.deepcopy(model)))[1]
    at('trace')
    graph, row['trace_s'] = timed(lambda: mmprune.trace(model, forward, also=tuple(runs[1:])))
    row['unknown'] = {name: places[:3] for name, places in graph.unknown_ops.items()}
    row['params'] = graph.params
    row |= {'free': shares(graph), 'locks': lock_reasons(graph)}
    row['all_locks'] = [f'{locked.count:5d} {locked}' for locked in graph.locked]
    at('choose')
    budget = mmprune.Budget(keep_channels=0.7, divisor=1)
    keep = mmprune.choose(graph, score_now(graph, 'l2'), budget)
    plan = mmprune.make_plan(graph, model, keep, budget.to_meta())
    row['flops_kept'] = plan.history[0]['flops'] / plan.history[0]['flops_before']
    row['params_kept'] = plan.history[0]['params'] / plan.history[0]['params_before']
    at('cut')
    pruned = copy.deepcopy(model)
    cut(pruned, plan)
    at('verify')
    row['error'] = checked(row, model, pruned, plan, forward)
    del graph, keep
    at('rebuild')
    row['rebuilds'] = rebuilds(config, pruned, forward)
    if not row['rebuilds'] and not rebuilds(config, model, forward):
        # The loss counts its runs, or its random numbers depend on memory addresses.
        row['rebuilds'] = None
        row['note'] = 'the losses of the original also change when its own checkpoint is loaded'
    for predict in runs[1:]:
        at('predict')
        row['error_predict'] = checked(row, model, pruned, plan, predict)
    at('step')
    row['steps'] = steps(pruned, forward)
    at('done')


def in_mode(model, mode: str, forward):
    """Runs the model in evaluation mode, with ``mode`` as argument of ``forward``."""
    from mmprune.mm.model_modes import in_evaluation

    with in_evaluation(model):
        return forward(model, mode=mode)


def checked(row: dict, model, pruned, plan, forward) -> float:
    """Returns the relative error of the pruned model, in single precision if it is below ``TOLERANCE``
    there.

    If it is not below, rounding may be the cause. Then the models are compared in double precision, and
    the error in single precision is recorded in ``row``.

    Raises:
        PruneError: the error is too large in double precision as well.
    """
    from mmprune.check.verify import compare, compare_in_double
    from mmprune.errors import PruneError

    error, complaint = compare(model, pruned, plan, forward, TOLERANCE)
    if not complaint:
        return error
    row['single'] = max(error, row.get('single', 0))
    try:
        error, complaint = compare_in_double(model, pruned, plan, forward)
    except RuntimeError as cause:  # some operations have no kernel for double precision
        complaint += f' (and in double: {cause})'
    if complaint:
        raise PruneError(complaint)
    return error


def timed(function):
    """Returns the result of a function, and the processor time that it took, in seconds."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def shares(graph) -> dict[str, float]:
    """Computes the fraction of parameters that belong to removable channels, for backbone, neck and
    heads."""
    import numpy as np

    from mmprune.graph import cost

    params_by_part: Counter = Counter()
    locked_by_part: Counter = Counter()
    no_units = np.zeros(graph.n_units, dtype=bool)
    for part in {cost.part_of(name) for name in graph.slots.tensors}:
        column = 'backbone' if part.startswith('backbone') else 'neck' if 'neck' in part else 'heads'
        count = cost.params(graph, part)
        params_by_part[column] += count(~no_units)
        locked_by_part[column] += count(no_units)
    return {
        column: 1 - locked_by_part[column] / params_by_part[column]
        for column in params_by_part
        if params_by_part[column]
    }


def lock_reasons(graph) -> list[str]:
    """Returns the four most frequent reasons of locks, except outputs, with the number of locked
    units."""
    from mmprune.graph.locks import LockKind

    counts: Counter = Counter()
    outputs = (LockKind.OUTPUT, LockKind.LOSS_INPUT, LockKind.UNREAD, LockKind.UNUSED)
    for locked in graph.locked:
        if not any(reason.kind in outputs for reason in locked.reasons):
            counts[locked.reasons[0].text] += locked.count
    return [f'{reason} ({count})' for reason, count in counts.most_common(4)]


def rebuilds(config: str, trained, forward) -> bool:
    """Returns whether a fresh model has the same outputs after the checkpoint of ``trained`` is loaded.

    The weights are equal bit for bit. The outputs may differ in the last bits, because some kernels sum
    in an order that depends on memory addresses.
    """
    import torch

    import mmprune
    from mmprune.check.compare import relative_error
    from mmprune.contexts import evaluating, unchanged
    from mmprune.nested import tensors_in
    from mmprune.surgery.meta import load_weights
    from tools.zoo import bare

    file = io.BytesIO()
    plan = mmprune.plan_of(trained)
    meta = None if plan is None else plan.to_meta()
    torch.save({'meta': meta, 'state_dict': trained.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    fresh = bare(config)
    if meta is not None:
        mmprune.Plan.from_meta(checkpoint['meta']).apply(fresh)
    load_weights(fresh, checkpoint, 'the checkpoint')
    outputs = []
    for model in (trained, fresh):
        with evaluating(model), unchanged(model), torch.no_grad():
            torch.manual_seed(0)
            outputs.append(list(tensors_in(forward(model))))
    return all(
        expected.shape == actual.shape and relative_error(expected, actual) <= 1e-6
        for expected, actual in zip(*outputs, strict=True)
    )


def steps(pruned, forward) -> bool:
    """Makes a step of SGD, and returns whether any weight has a gradient other than zero."""
    import torch

    from mmprune.nested import tensors_in

    optimizer = torch.optim.SGD(
        [parameter for parameter in pruned.parameters() if parameter.requires_grad], lr=1e-6
    )
    outputs = forward(pruned)
    if isinstance(outputs, dict):
        outputs = {
            name: value
            for name, value in outputs.items()
            if 'loss' in name or not hasattr(pruned, 'parse_losses')
        }
    loss = sum(tensor.sum() for tensor in tensors_in(outputs) if tensor.requires_grad)
    loss.backward()
    moved = any(
        parameter.grad is not None and bool((parameter.grad != 0).any())
        for parameter in pruned.parameters()
    )
    optimizer.step()
    return moved


# -- all families ---------------------------------------------------------------------------------


def run(name: str, config: str, arguments: dict, limit: int, examine: Callable = examine) -> dict:
    """Examines a family in a separate process, for at most ``limit`` seconds.

    Returns:
        The row of the family. If an error occurred, ``row['failure']`` describes it.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(sender, config, arguments, examine))
    process.start()
    sender.close()
    row: dict = {'config': config, 'stage': 'import'}
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            row = receiver.recv()
        row['failure'] = f'no end within {limit} s'
        process.kill()
    except EOFError:
        process.join()
        if row['stage'] != 'done' and 'failure' not in row:
            row['failure'] = f'the process ended with {process.exitcode}'
    return {'name': name} | row


def child(pipe, config: str, arguments: dict, examine: Callable) -> None:
    """Examines a family, and sends the row after each stage, so that the results of earlier stages
    survive a crash. The output of the process is discarded."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    row: dict = {'config': config}
    try:
        examine(config, arguments, row, lambda: pipe.send(row))
    except Exception as error:  # the table reports every exception of a model
        row['failure'] = ''.join(traceback.format_exception_only(error)).strip().splitlines()[0][:400]
        pipe.send(row)


def verdict(row: dict) -> str:
    """Returns the result of a family in a few words."""
    if 'failure' in row:
        return 'does not build' if row['stage'] in ('import', 'build') else f'fails: {row["stage"]}'
    if row['rebuilds'] is False or not row['steps']:
        return 'no rebuild' if row['rebuilds'] is False else 'no step'
    return 'exact'


INTRODUCTION = """# Coverage of the zoos

For readers who want to know whether a family of models can be pruned, and how much of it.

The table has one model of each family, with random weights and two random images. 30 % of every group
of channels were cut. The columns are:

- *Result*: *exact* means three things. The pruned model computes what the original computes with the
  cut channels at zero: in the losses, the predictions and every layer, to 1e-5 of the largest value.
  Its checkpoint rebuilds it from the unpruned config. It can make a step of SGD.
- *Error*: the largest relative difference. If single precision is too coarse, it is the difference in
  double precision, and the one in single precision follows in brackets.
- *Free*: the fraction of parameters that belong to removable channels.
- *Left*: the fraction of parameters that remain after the cut.
- *Trace*: the time of the trace, divided by the time of a forward of the same batch.
- *Trained with the hook*: a short training with the defaults of `PruneHook(keep_flops=0.5)`,
  interrupted and resumed before its last cut. The models of torchvision use `Pruner(compensate=True)`.
  An empty cell means that the training was not run.

The table was made with mmdet 3.3.0, mmpose 1.3.2, torchvision 0.28.0 and torch 2.13.0 on a CPU, by

    python tools/coverage.py
    python tools/coverage_train.py

## Locked on purpose

Some operations mix all of their input channels, or use the number of channels. If no cut of them is
exact, or if no rule knows one, they lock the channels:

- Layer norm, softmax, mean, maximum and sorting over channels.
- Standardized weights (NFNet, BiT, weight standardization) lock the *inputs* of their layer, because
  mean and variance of the weight are taken over them. The outputs are free.
- Both kinds of `spectral_norm` lock the *inputs* of their layer, because the estimate of the largest
  singular value keeps a buffer over inputs and kernel positions. The outputs are free.
- Fourier transforms (`torch.fft`, and convolutions that use them) lock all input channels. A transform
  over space alone does not mix channels, but it has no rule.
- `nn.MultiheadAttention` and recurrent layers (`nn.LSTM`, `nn.GRU`) check the sizes that they were
  created with, so their own channels stay.
"""


def write_page(rows: list[dict], path: Path) -> None:
    """Writes the table in Markdown."""
    lines = INTRODUCTION.splitlines() + ['']
    for zoo in dict.fromkeys(row['name'].split('/')[0] for row in rows):
        of_zoo = [row for row in rows if row['name'].startswith(zoo + '/')]
        built = [row for row in of_zoo if verdict(row) != 'does not build']
        exact = sum(verdict(row) == 'exact' for row in built)
        lines += [
            f'## {zoo}: {exact} exact of {len(built)} that build on a CPU',
            '',
            '| family | result | error | free: backbone | neck | heads | left '
            '| trace | trained with the hook | locks, except outputs |',
            '|---|---|---|---|---|---|---|---|---|---|',
        ]
        lines += ['| ' + ' | '.join(cells(row)) + ' |' for row in built] + ['']
        trained = [row['training'] for row in built if 'training' in row]
        completed = sum('failure' not in result for result in trained)
        lines += [f'Complete trainings with the hook: {completed} of {len(trained)}.', '']
        missing = [row for row in of_zoo if row not in built]
        if missing:
            lines += ['These do not build here:', '']
            lines += [f'- `{row["config"]}`: {row["failure"]}' for row in missing] + ['']
    names = {row['name'] for row in rows}
    waiting = [name for name in families() if name not in names]
    if waiting:
        lines += ['## Not examined yet', '', ', '.join(waiting), '']
    path.write_text('\n'.join(lines))


def cells(row: dict) -> list[str]:
    """Returns the cells of a row of the table."""
    free = row.get('free', {})
    error = max(row.get('error', 0), row.get('error_predict', 0))
    remarks = [row['failure']] if 'failure' in row else list(row.get('locks', []))
    remarks += [f'no rule for {name}' for name in row.get('unknown', {})]
    if 'note' in row:
        remarks.append(row['note'])
    error_text = f'{error:.0e}' if 'error' in row else ''
    if 'single' in row:
        error_text += f' ({row["single"]:.0e})'
    return [
        row['name'].split('/')[1],
        verdict(row),
        error_text,
        *(f'{free[part]:.0%}' if part in free else '' for part in ('backbone', 'neck', 'heads')),
        f'{row["params_kept"]:.0%}' if 'params_kept' in row else '',
        f'{row["trace_s"] / row["forward_s"]:.1f}' if 'trace_s' in row else '',
        training_cell(row.get('training')),
        '; '.join(remarks),
    ]


def training_cell(result: dict | None) -> str:
    """Returns the result of ``tools/coverage_train.py`` for a family, as a cell of the table."""
    if not result:
        return ''
    if 'failure' not in result:
        keep_flops = result.get('keep_flops', 0.5)
        budget = f', keep_flops={keep_flops}' if keep_flops != 0.5 else ''
        return f'{result["cuts"]} cuts, {result["resumed"]} of them resumed{budget}'
    stage = f'fails in the {result["stage"]} after {result["cuts"]} cuts'
    if result['stage'] in ('import', 'build', 'loss'):
        stage = f'not trained ({result["stage"]})'
    place = f' (`{result["where"]}`)' if result.get('where') else ''
    return f'{stage}: {result["failure"]}{place}'.replace('|', '/')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns of names, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='number of processes at a time')
    parser.add_argument(
        '--limit', type=int, default=600, help='the longest time for a family, in seconds'
    )
    parser.add_argument('--reasons', action='store_true', help='print all locks of the families')
    arguments = parser.parse_args()
    chosen = {
        name: family
        for name, family in families().items()
        if any(fnmatchcase(name, pattern) for pattern in arguments.only)
    }
    if not chosen:
        parser.error(f'--only {arguments.only}: no such family in {FAMILIES.name}')
    warm_up()
    RESULTS.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = [pool.submit(run, name, *family, arguments.limit) for name, family in chosen.items()]
        for future in pending:
            row = future.result()
            locks = row.pop('all_locks', [])
            show(row)
            if arguments.reasons:
                print('\n'.join(locks))
            keep(row)
    rows = json.loads(RESULTS.read_text())
    write_page(rows, PAGE)
    counts = Counter(verdict(row) for row in rows)
    print('all families:', ', '.join(f'{count} {name}' for name, count in counts.most_common()))


def warm_up() -> None:
    """Imports the packages that all families need before their processes are forked."""
    warnings.simplefilter('ignore')
    os.environ['OMP_NUM_THREADS'] = '1'
    import mmdet.utils
    import mmpose.utils
    import torch

    import tools.zoo  # noqa: F401

    torch.set_num_threads(1)
    mmdet.utils.register_all_modules(init_default_scope=False)
    mmpose.utils.register_all_modules(init_default_scope=False)


def keep(row: dict) -> None:
    """Writes one row to the JSON file, in the order of the families."""
    by_name = {r['name']: r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    # The result of tools/coverage_train.py belongs to the same row.
    training = by_name.get(row['name'], {}).get('training')
    by_name[row['name']] = row | ({'training': training} if training else {})
    rows = [by_name[name] for name in families() if name in by_name]
    RESULTS.write_text(json.dumps(rows, indent=1) + '\n')


def show(row: dict) -> None:
    """Prints one row in colours."""
    from rich.console import Console
    from rich.markup import escape

    colours = {'exact': 'green', 'does not build': 'yellow'}
    colour = colours.get(verdict(row), 'red')
    _, result, error, *free, _, trace, _, remarks = cells(row)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(
        f'{row["name"]:30s} [{colour}]{result:15s}[/] {error:13s} free {" ".join(free):19s} '
        f'trace {trace:>4s}x  {escape(remarks[:400])}'
    )


if __name__ == '__main__':
    main()
