"""Cuts 30 % of every group in one model of each family of the zoos, and checks what comes out.

    python tools/coverage.py                    # all of tools/coverage.txt, about an hour on 2 cores
    python tools/coverage.py --only 'mmdet/*r*' --jobs 2
    python tools/coverage.py --only mmdet/detr --reasons    # all locks of one family

Each family runs in a process of its own, with random weights and nothing downloaded. Results are
merged into docs/coverage.json, and the table in docs/coverage.md is written from that.
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
sys.path.insert(0, str(ROOT))  # for tools.zoo

FAMILIES = ROOT / 'tools' / 'coverage.txt'
RESULTS = ROOT / 'docs' / 'coverage.json'
PAGE = ROOT / 'docs' / 'coverage.md'
TOLERANCE = 1e-5
FORK = multiprocessing.get_context('fork')


def families() -> dict[str, tuple[str, dict]]:
    """{'mmdet/atss': (config, further arguments of ``build``)} in the order of the file."""
    found, zoo = {}, ''
    for line in FAMILIES.read_text().splitlines():
        if line.startswith('['):
            zoo = line.strip('[] ')
        elif line.strip() and not line.startswith('#'):
            name, config, *options = line.split()
            how = dict(option.split('=') for option in options)
            if 'size' in how:
                how['size'] = int(how['size'])
            found[f'{zoo}/{name}'] = (config, how)
    return found


# -- one family, in its own process ---------------------------------------------------------------


def examine(config: str, how: dict, row: dict, done: Callable[[], None]) -> None:
    """Fills the row of one family; calls ``done`` after each stage."""
    import torch

    import mmprune
    from mmprune.api import score_now
    from mmprune.budget.choose import Budget, choose
    from mmprune.mm.model_modes import both
    from tools.zoo import build
    from mmprune.surgery.apply import cut
    from mmprune.surgery.build import make_plan

    def at(stage: str) -> None:
        row['stage'] = stage
        done()

    at('build')
    model, forward = build(config, **how)
    runs = [forward]
    if not config.startswith('torchvision'):
        runs.append(lambda m: in_mode(m, 'predict', forward))
        with torch.no_grad():
            try:
                runs[1](copy.deepcopy(model))
            except Exception as error:  # a fault of the zoo, whatever it is, and none of the cut
                row['note'] = f'the original predicts nothing here: {error}'[:200]
                runs.pop()
    with torch.no_grad():
        row['forward_s'] = timed(lambda: both(*runs)(copy.deepcopy(model)))[1]
    at('trace')
    trace, row['trace_s'] = timed(lambda: mmprune.trace(model, forward, also=tuple(runs[1:])))
    row['unknown'] = {name: where[:3] for name, where in trace.unknown_ops.items()}
    row['params'] = trace.params
    row |= {'free': shares(trace), 'locks': lock_reasons(trace)}
    row['all_locks'] = [f'{locked.count:5d} {locked}' for locked in trace.locked]
    at('choose')
    budget = Budget(keep_channels=0.7, divisor=1)
    keep = choose(trace, score_now(trace, 'l2'), budget)
    plan = make_plan(trace, model, keep, budget.to_meta())
    row['flops_kept'] = plan.history[0]['flops'] / plan.history[0]['flops_before']
    row['params_kept'] = plan.history[0]['params'] / plan.history[0]['params_before']
    at('cut')
    pruned = copy.deepcopy(model)
    cut(pruned, plan)
    at('verify')
    row['error'] = checked(row, model, pruned, plan, forward)
    del trace, keep
    at('rebuild')
    row['rebuilds'] = rebuilds(config, pruned, forward)
    if not row['rebuilds'] and not rebuilds(config, model, forward):
        row['rebuilds'] = None  # a loss that counts its runs, or draws by where objects lie in memory
        row['note'] = 'nor has the original the same losses after its own checkpoint was loaded'
    for predict in runs[1:]:
        at('predict')
        row['error_predict'] = checked(row, model, pruned, plan, predict)
    at('step')
    row['steps'] = steps(pruned, forward)
    at('done')


def in_mode(model, mode: str, forward):
    """One run in evaluation mode."""
    from mmprune.mm.model_modes import in_evaluation

    with in_evaluation(model):
        return forward(model, mode=mode)


def checked(row: dict, model, pruned, plan, forward) -> float:
    """The relative error in single precision, or in double where rounding may be more than 1e-5."""
    from mmprune.check.verify import compare, compare_in_double
    from mmprune.errors import PruneError

    error, complaint = compare(model, pruned, plan, forward, TOLERANCE)
    if not complaint:
        return error
    row['single'] = max(error, row.get('single', 0))
    try:
        error, complaint = compare_in_double(model, pruned, plan, forward)
    except RuntimeError as cause:  # not all code runs in double
        complaint += f' (and in double: {cause})'
    if complaint:
        raise PruneError(complaint)
    return error


def timed(function):
    start = time.process_time()  # of one thread: what else runs does not count
    result = function()
    return result, time.process_time() - start


def shares(trace) -> dict[str, float]:
    """The share of parameters that hang on channels which may go, by part."""
    import numpy as np

    from mmprune.graph import cost

    whole: Counter = Counter()
    left: Counter = Counter()
    none = np.zeros(trace.n_units, dtype=bool)
    for part in {cost.part_of(name) for name in trace.slots.tensors}:
        column = 'backbone' if part.startswith('backbone') else 'neck' if 'neck' in part else 'heads'
        count = cost.params(trace, part)
        whole[column] += count(~none)
        left[column] += count(none)
    return {column: 1 - left[column] / whole[column] for column in whole if whole[column]}


def lock_reasons(trace) -> list[str]:
    """The commonest reasons other than being an output, with the number of locked units."""
    from mmprune.graph.locks import LockKind

    found: Counter = Counter()
    outputs = (LockKind.OUTPUT, LockKind.LOSS_INPUT, LockKind.UNREAD, LockKind.UNUSED)
    for locked in trace.locked:
        if not any(reason.kind in outputs for reason in locked.reasons):
            found[locked.reasons[0].text] += locked.count
    return [f'{reason} ({count})' for reason, count in found.most_common(4)]


def rebuilds(config: str, trained, forward) -> bool:
    """Whether a checkpoint of it, pruned or not, brings a fresh model to the same outputs.

    The weights are equal bit for bit; kernels that sum in an order that depends on where the memory
    lies may still differ in the last bits.
    """
    import torch

    import mmprune
    from mmprune.check.compare import relative_error
    from mmprune.contexts import evaluating, tensors_in, unchanged
    from tools.zoo import bare
    from mmprune.surgery.meta import load_weights

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
        a.shape == b.shape and relative_error(a, b) <= 1e-6 for a, b in zip(*outputs, strict=True)
    )


def steps(pruned, forward) -> bool:
    """Whether a step of SGD goes through and moves weights."""
    import torch

    from mmprune.contexts import tensors_in

    # Some configs freeze all that is left of a part; some losses have no gradient at all.
    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=1e-6)
    out = forward(pruned)
    if isinstance(out, dict):
        out = {k: v for k, v in out.items() if 'loss' in k or not hasattr(pruned, 'parse_losses')}
    loss = sum(t.sum() for t in tensors_in(out) if t.requires_grad)
    loss.backward()
    moved = sum(p.grad is not None and bool((p.grad != 0).any()) for p in pruned.parameters())
    optimizer.step()
    return moved > 0


# -- all of them ----------------------------------------------------------------------------------


def run(name: str, config: str, how: dict, limit: int, examine: Callable = examine) -> dict:
    """The row of one family, from a process with a time limit; errors stand in the row."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(there, config, how, examine))
    process.start()
    there.close()
    row: dict = {'config': config, 'stage': 'import'}
    end = time.monotonic() + limit
    try:
        while here.poll(max(0, end - time.monotonic())):
            row = here.recv()
        row['failure'] = f'no end within {limit} s'
        process.kill()
    except EOFError:
        process.join()
        if row['stage'] != 'done' and 'failure' not in row:
            row['failure'] = f'the process ended with {process.exitcode}'
    return {'name': name} | row


def child(pipe, config: str, how: dict, examine: Callable) -> None:
    """Sends the row after each stage, so that a crash leaves what came before."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    row: dict = {'config': config}
    try:
        examine(config, how, row, lambda: pipe.send(row))
    except Exception as error:  # whatever a model of the zoo may raise belongs into the table
        row['failure'] = ''.join(traceback.format_exception_only(error)).strip().splitlines()[0][:400]
        pipe.send(row)


def verdict(row: dict) -> str:
    if 'failure' in row:
        return 'does not build' if row['stage'] in ('import', 'build') else f'fails: {row["stage"]}'
    if row['rebuilds'] is False or not row['steps']:
        return 'no rebuild' if row['rebuilds'] is False else 'no step'
    return 'exact'


LOCKED_ON_PURPOSE = """## Locked on purpose

Some operations mix all channels that go in, or compute with their number. Where no cut of them is
exact, or no rule knows one, they lock the channels:

- Layer norm, softmax, mean, maximum and sorting over channels.
- Standardized weights (NFNet, BiT, weight standardization) lock the *inputs* of their layer: the mean
  and the variance of the weight run over them. The outputs are free.
- Both kinds of `spectral_norm` lock the *inputs* of their layer: the estimate of the largest singular
  value keeps a buffer over inputs and kernel positions together. The outputs are free.
- Fourier transforms (`torch.fft`, and convolutions that are made of them) lock all channels that go
  in. A transform over space alone treats channels apart, but it has no rule.
- `nn.MultiheadAttention` and recurrent layers (`nn.LSTM`, `nn.GRU`) check the sizes that they were
  made with, so all of their own channels stay.
"""


def write_page(rows: list[dict], path: Path) -> None:
    """The table in Markdown."""
    lines = [
        '# Coverage of the zoos',
        '',
        'One model of each family, random weights, two random images; 30 % of every group of channels',
        'cut. *Exact*: the pruned model equals the original with the cut channels at zero, in the',
        'losses, the predictions and every layer on the way, to 1e-5 of the largest value in single',
        'precision, or, where rounding alone is more (given in brackets), the same in double; its',
        'checkpoint rebuilds it from the unpruned config, with the same outputs (where the original',
        'comes back so); it takes a step of SGD. *Free*: the share of parameters that hang on channels',
        'which may go; *left*: that of parameters after the cut. *Trace*: seconds to find what can be',
        'cut, in forwards of the same batch. *Trained with the hook*: a short training with the',
        'defaults of `PruneHook(keep_flops=0.5)` (torchvision: `Pruner(compensate=True)`), interrupted',
        'and resumed before its last cut, ends with finite losses; empty: not run. Made with',
        '',
        '    python tools/coverage.py',
        '    python tools/coverage_train.py',
        '',
        '(mmdet 3.3.0, mmpose 1.3.2, torchvision 0.28.0, torch 2.13.0 on a CPU.)',
        '',
        *LOCKED_ON_PURPOSE.splitlines(),
        '',
    ]
    for zoo in dict.fromkeys(row['name'].split('/')[0] for row in rows):
        own = [row for row in rows if row['name'].startswith(zoo + '/')]
        built = [row for row in own if verdict(row) != 'does not build']
        exact = sum(verdict(row) == 'exact' for row in built)
        lines += [
            f'## {zoo}: {exact} exact of {len(built)} that build on a CPU',
            '',
            '| family | result | error | free: backbone | neck | heads | left after the cut '
            '| trace / forward | trained with the hook | locked, beside outputs |',
            '|---|---|---|---|---|---|---|---|---|---|',
        ]
        lines += [markdown_row(row) for row in built] + ['']
        trained = [row['training'] for row in built if 'training' in row]
        ended = sum('failure' not in found for found in trained)
        lines += [f'Trained with the hook to the end: {ended} of {len(trained)} that were tried.', '']
        missing = [row for row in own if row not in built]
        if missing:
            lines += ['Does not build here:', '']
            lines += [f'- `{row["config"]}`: {row["failure"]}' for row in missing] + ['']
    waiting = [name for name in families() if name not in {row['name'] for row in rows}]
    if waiting:
        lines += ['## No result of the present code yet', '', ', '.join(waiting), '']
    path.write_text('\n'.join(lines))


def markdown_row(row: dict) -> str:
    return '| ' + ' | '.join(cells(row)) + ' |'


def cells(row: dict) -> list[str]:
    free = row.get('free', {})
    error = max(row.get('error', 0), row.get('error_predict', 0))
    told = [row['failure']] if 'failure' in row else row.get('locks', [])
    told = told + [f'no rule for {name}' for name in row.get('unknown', {})]
    if 'note' in row:
        told = [*told, row['note']]
    return [
        row['name'].split('/')[1],
        verdict(row),
        (f'{error:.0e}' if 'error' in row else '')
        + (f' ({row["single"]:.0e})' if 'single' in row else ''),
        *(f'{free[part]:.0%}' if part in free else '' for part in ('backbone', 'neck', 'heads')),
        f'{row["params_kept"]:.0%}' if 'params_kept' in row else '',
        f'{row["trace_s"] / row["forward_s"]:.1f}' if 'trace_s' in row else '',
        training_cell(row.get('training')),
        '; '.join(told),
    ]


def training_cell(found: dict | None) -> str:
    """What ``tools/coverage_train.py`` found of a family."""
    if not found:
        return ''
    if 'failure' not in found:
        budget = f', keep_flops={found["keep_flops"]}' if found.get('keep_flops', 0.5) != 0.5 else ''
        return f'{found["cuts"]} cuts, {found["resumed"]} of them resumed{budget}'
    stage = f'fails in the {found["stage"]} after {found["cuts"]} cuts'
    if found['stage'] in ('import', 'build', 'loss'):
        stage = f'not trained ({found["stage"]})'
    where = f' (`{found["where"]}`)' if found.get('where') else ''
    return f'{stage}: {found["failure"]}{where}'.replace('|', '/')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--limit', type=int, default=600, help='seconds for one family')
    parser.add_argument('--reasons', action='store_true', help='print every lock of the families')
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
        pending = [pool.submit(run, n, *f, arguments.limit) for n, f in chosen.items()]
        for future in pending:
            row = future.result()
            locks = row.pop('all_locks', [])
            show(row)
            if arguments.reasons:
                print('\n'.join(locks))
            keep(row)
    known = json.loads(RESULTS.read_text())
    write_page(known, PAGE)
    counts = Counter(verdict(row) for row in known)
    print('all families:', ', '.join(f'{count} {name}' for name, count in counts.most_common()))


def warm_up() -> None:
    """Imports once what every family's process needs."""
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
    """Puts one row into the JSON file, in the order of the families."""
    known = {r['name']: r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    trained = known.get(row['name'], {}).get('training')  # by tools/coverage_train.py
    known[row['name']] = row | ({'training': trained} if trained else {})
    rows = [known[name] for name in families() if name in known]
    RESULTS.write_text(json.dumps(rows, indent=1) + '\n')


def show(row: dict) -> None:
    from rich.console import Console
    from rich.markup import escape

    colours = {'exact': 'green', 'does not build': 'yellow'}
    colour = colours.get(verdict(row), 'red')
    name, result, error, *free, ratio, _, told = cells(row)
    print_to = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    print_to.print(
        f'{row["name"]:30s} [{colour}]{result:15s}[/] {error:13s} free {" ".join(free):19s} '
        f'trace {ratio:>4s}x  {escape(told[:400])}'
    )


if __name__ == '__main__':
    main()
