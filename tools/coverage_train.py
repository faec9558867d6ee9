"""Trains one model of each family of the zoos for some steps with the hook's defaults, and cuts it.

    python tools/coverage_train.py               # all of tools/coverage.txt, under an hour on one core
    python tools/coverage_train.py --only 'mmdet/*gn*' mmpose/vitpose
    python tools/coverage_train.py --resume      # only families without a result

Each family runs in a process of its own with a time limit. Weights are random, nothing is downloaded,
and the data are a few drawn pictures. mmengine's Runner trains the models of mmdet and mmpose with
``PruneHook(keep_flops=0.5)``: two cuts, an interruption, and a third cut in a run that resumes from a
checkpoint. A plain loop with ``Pruner(compensate=True)`` does the same with the models of torchvision.
Results are written into docs/coverage.json after each family, and docs/coverage.md is made from it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import coverage  # noqa: E402

CUTS, FIRST = 3, 2
"""Cuts in all, and those before the interruption."""

MOST = 28
"""Iterations of a training: the trace may wait twenty of them for a batch on which every layer runs."""

KEEP_FLOPS = 0.5
"""The budget. A family that locks more than this leaves gets what :func:`budget_of` gives."""

OPTIMIZER = dict(lr=1e-3, momentum=0.9)


class Interrupted(Exception):
    """Ends a training as a killed process would."""


# -- one family, in its own process ---------------------------------------------------------------


def examine(config: str, how: dict, row: dict, done: Callable[[], None]) -> None:
    """Fills the row of one family and calls ``done`` after each stage."""

    def at(stage: str) -> None:
        row['stage'] = stage
        done()

    row |= {'cuts': 0, 'resumed': 0, 'losses': [], 'warnings': []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if config.startswith('torchvision'):
                train_plainly(config, how, row, at)
            else:
                train_with_hook(config, how, row, at, Path(folder))
    except Exception as error:
        row['where'] = last_place(error)
        raise
    finally:
        row['losses'] = [float(f'{loss:.4g}') for loss in row['losses']]
        row['warnings'] = list(dict.fromkeys(text[:200] for text in row['warnings']))[:6]
    if not all(map(math.isfinite, row['losses'])):
        raise FloatingPointError(f'the loss is not finite: {row["losses"]}')
    if row['cuts'] < 3 or not row['resumed']:
        raise RuntimeError(f'{row["cuts"]} cuts in {len(row["losses"])} iterations')
    at('done')


def last_place(error: BaseException) -> str:
    """The last line of mmprune's own code that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if '/mmprune/' in frame.filename]
    return f'{own[-1].filename.rsplit("/mmprune/", 1)[1]}:{own[-1].lineno}' if own else ''


def train_with_hook(config: str, how: dict, row: dict, at: Callable, folder: Path) -> None:
    """Two trainings by mmengine's Runner. The second one resumes from the first one's checkpoint."""
    from tools import zoo

    at('build')
    keep_flops = row['keep_flops'] = how.pop('keep_flops', KEEP_FLOPS)
    cfg = zoo.load(config)
    model, forward = zoo.build(cfg, **how | {'mode': 'loss'})
    samples = drawn_samples(cfg, model, how.get('size', 96))
    at('loss')
    forward(model)  # an error here is one of the family or of its inputs, not of the hook
    scope = cfg.get('default_scope') or 'mmengine'
    at('first run')
    try:
        runner_of(model, scope, samples, folder, row, keep_flops, FIRST).train()
    except Interrupted:
        at('resumed run')
    else:
        raise RuntimeError('the first run came to its end before it was interrupted')
    del model
    checkpoint = str(folder / 'interrupted.pth')
    runner = runner_of(zoo.bare(cfg), scope, samples, folder, row, keep_flops, CUTS, checkpoint)
    runner.train()
    if not (folder / 'prune_report.json').is_file() or not (folder / 'report.html').is_file():
        raise RuntimeError('the resumed run wrote no report')


def drawn_samples(cfg, model, size: int) -> list[dict]:
    """Six samples as a data set gives them. Each box of a detector is a filled rectangle."""
    from tools import zoo

    found = []
    for number in range(3):
        batch = zoo.raw_batch(cfg, model, size, seed=number)
        for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
            boxes = sample.gt_instances.bboxes if cfg.get('default_scope') == 'mmdet' else ()
            for box in getattr(boxes, 'tensor', boxes):
                x1, y1, x2, y2 = (max(0, int(side)) for side in box)
                image[:, y1:y2, x1:x2] = 60 * number + 40
            found.append({'inputs': image, 'data_samples': sample})
    return found


def runner_of(
    model, scope: str, samples: list[dict], folder: Path, row: dict, keep_flops: float,
    stop_after: int, checkpoint: str | None = None,
) -> Any:  # fmt: skip
    """A Runner that trains ``model`` until ``stop_after`` cuts were made.

    Args:
        model: the model, on the CPU.
        scope: the registry that its config names.
        samples: of the data set, in order.
        folder: the work directory.
        row: gets losses, cuts and warnings.
        keep_flops: the budget.
        stop_after: the number of cuts. After it a run without ``checkpoint`` saves its own and is
            interrupted. A run with a checkpoint ends one iteration later.
        checkpoint: the file to resume from.
    """
    import logging

    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from mmprune.mm.hooks import PruneHook

    class Watch(Hook):
        priority = 'LOWEST'
        ends = False

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            row['losses'].append(float(outputs['loss']))
            hook = next(each for each in runner.hooks if isinstance(each, PruneHook))
            row['resumed'] += hook.cuts - row['cuts'] if checkpoint is not None else 0
            row['cuts'] = hook.cuts
            if hook.cuts >= stop_after and checkpoint is None:
                runner.save_checkpoint(str(folder), 'interrupted.pth', by_epoch=False)
                raise Interrupted
            runner.train_loop.stop_training = self.ends
            self.ends = hook.cuts >= stop_after

    class Keep(logging.Handler):
        def emit(self, record):
            if '/mmprune/' in record.pathname:
                row['warnings'].append(record.getMessage())

    runner = Runner(
        model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=min(2, len(samples)), dataset=samples, collate_fn=dict(type='pseudo_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=MOST),
        optim_wrapper=dict(
            type='OptimWrapper', optimizer=dict(type='SGD', **OPTIMIZER), clip_grad=dict(max_norm=1.0)
        ),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[PruneHook(keep_flops=keep_flops, interval=1, steps=CUTS), Watch()],
        load_from=checkpoint,
        resume=checkpoint is not None,
        log_level='WARNING',
        default_scope=scope,
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}_{stop_after}',
        cfg=Config(),
    )  # fmt: skip
    for logger in (runner.logger, logging.getLogger('mmprune')):
        logger.addHandler(Keep(logging.WARNING))
    return runner


def train_plainly(config: str, how: dict, row: dict, at: Callable) -> None:
    """A loop of one's own with a ``Pruner``. The last cut is made in a model that was loaded."""
    import torch

    import mmprune
    from tools import zoo

    at('build')
    model, forward = zoo.build(config, **how)
    at('first run')

    def to_loss(model, _):
        return sum(t.float().square().mean() for t in mmprune.contexts.tensors_in(forward(model)))

    for half in range(2):
        if half:
            saved = {'structure': mmprune.save_model_def(model), 'weights': model.state_dict()}
            model = mmprune.load_model_def(zoo.bare(config), saved)
            model.load_state_dict(saved['weights'])
            zoo.at_size(model, how.get('size', 96))
            at('resumed run')
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, **OPTIMIZER)
        pruner = mmprune.Pruner(model, compensate=True)
        for step in range(2 * (FIRST if not half else CUTS - FIRST) + 1):
            if step % 2:
                done = pruner.rebuild_model(None, to_loss, optimizer, prune_num=24)
                row['cuts'] += done.units > 0
                row['resumed'] += half * (done.units > 0)
                continue
            loss = to_loss(model, None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            row['losses'].append(float(loss))
        pruner.close()


# -- all of them ----------------------------------------------------------------------------------


def train(name: str, config: str, how: dict, limit: int, known: dict) -> dict:
    """What a training of one family came to, for its row in docs/coverage.json. ``known``: that row."""
    start = time.monotonic()
    if not config.startswith('torchvision'):
        how = how | {'keep_flops': budget_of(known)}
    found = coverage.run(name, config, how, limit, examine)
    return {key: value for key, value in found.items() if key not in ('name', 'config')} | {
        'seconds': round(time.monotonic() - start)
    }


def budget_of(row: dict) -> float:
    """The fraction of the FLOPs that a training keeps: half, or, where so much is locked that half may
    be below the floor, a little more than what is left without 30 % of the channels."""
    left = row.get('flops_kept', 0)
    return KEEP_FLOPS if left < 0.55 else round(min(0.95, left + 0.05), 2)


def keep(name: str, found: dict) -> None:
    """Puts one result into the JSON file, into the row that ``tools/coverage.py`` made."""
    rows = json.loads(coverage.RESULTS.read_text())
    next(row for row in rows if row['name'] == name)['training'] = found
    coverage.RESULTS.write_text(json.dumps(rows, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--limit', type=int, default=300, help='seconds for one family')
    parser.add_argument('--resume', action='store_true', help='leave families that have a result')
    arguments = parser.parse_args()
    rows = {row['name']: row for row in json.loads(coverage.RESULTS.read_text())}
    chosen = {
        name: family
        for name, family in coverage.families().items()
        if any(fnmatchcase(name, pattern) for pattern in arguments.only)
        and name in rows
        and coverage.verdict(rows[name]) != 'does not build'
        and not (arguments.resume and 'training' in rows[name])
    }
    if not chosen:
        parser.error(f'--only {arguments.only}: no such family to train')
    coverage.warm_up()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {
            name: pool.submit(train, name, *family, arguments.limit, rows[name])
            for name, family in chosen.items()
        }
        for name, future in pending.items():
            found = future.result()
            print(f'{name:36s} {found["seconds"]:4d} s  {coverage.training_cell(found)}', flush=True)
            keep(name, found)
    known = json.loads(coverage.RESULTS.read_text())
    coverage.write_page(known, coverage.PAGE)


if __name__ == '__main__':
    main()
