"""Trains and cuts one model of each family of the zoos for some iterations, with the hook's defaults.

    python tools/coverage_train.py               # all families of tools/coverage.txt
    python tools/coverage_train.py --only 'mmdet/*gn*' mmpose/vitpose
    python tools/coverage_train.py --resume      # only families without a result

All families take less than an hour on one core. Each family runs in a separate process with a time
limit, with random weights, without downloads, on a few drawn pictures. mmengine's Runner trains the
models of mmdet and mmpose with ``PruneHook(keep_flops=0.5)``. It makes two cuts and is interrupted; a
second run resumes from the checkpoint and makes the third cut. The models of torchvision are trained in
a plain loop with ``Pruner(compensate=True)``. The results are written to docs/coverage.json, from which
docs/coverage.md is made.
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

CUTS = 3
"""The number of cuts in both runs together."""

CUTS_BEFORE = 2
"""The number of cuts before the interruption."""

ITERATIONS = 28
"""The number of iterations after which a training ends. The trace may wait up to 20 iterations for a
batch on which all layers run."""

KEEP_FLOPS = 0.5
"""The fraction of FLOPs that remains, except for families that lock too much (:func:`budget_of`)."""

OPTIMIZER = dict(lr=1e-3, momentum=0.9)
"""The options of SGD."""


class Interrupted(Exception):
    """Ends a training as a killed process would."""


# -- one family, in a separate process ------------------------------------------------------------


def examine(config: str, arguments: dict, row: dict, done: Callable[[], None]) -> None:
    """Trains one family, and fills its row. :func:`tools.coverage.examine` describes the arguments."""

    def at(stage: str) -> None:
        row['stage'] = stage
        done()

    row |= {'cuts': 0, 'resumed': 0, 'losses': [], 'warnings': []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if config.startswith('torchvision'):
                train_plainly(config, arguments, row, at)
            else:
                train_with_hook(config, arguments, row, at, Path(folder))
    except Exception as error:
        row['where'] = last_place(error)
        raise
    finally:
        row['losses'] = [float(f'{loss:.4g}') for loss in row['losses']]
        row['warnings'] = list(dict.fromkeys(text[:200] for text in row['warnings']))[:6]
    if not all(map(math.isfinite, row['losses'])):
        raise FloatingPointError(f'the loss is not finite: {row["losses"]}')
    if row['cuts'] < CUTS or not row['resumed']:
        raise RuntimeError(f'{row["cuts"]} cuts in {len(row["losses"])} iterations')
    at('done')


def last_place(error: BaseException) -> str:
    """Returns the innermost line of mmprune that an exception passed through, as ``FILE:LINE``; empty
    if it passed through none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if '/mmprune/' in frame.filename:
            return f'{frame.filename.rsplit("/mmprune/", 1)[1]}:{frame.lineno}'
    return ''


def train_with_hook(config: str, arguments: dict, row: dict, at: Callable, folder: Path) -> None:
    """Runs two trainings with mmengine's Runner. The second one resumes from the first checkpoint."""
    from tools import zoo

    at('build')
    keep_flops = row['keep_flops'] = arguments.pop('keep_flops', KEEP_FLOPS)
    cfg = zoo.load(config)
    model, forward = zoo.build(cfg, **arguments | {'mode': 'loss'})
    samples = drawn_samples(cfg, model, arguments.get('size', 96))
    at('loss')
    forward(model)  # an exception here comes from the family or its inputs, not from the hook
    scope = cfg.get('default_scope') or 'mmengine'
    at('first run')
    try:
        runner_of(model, scope, samples, folder, row, keep_flops, CUTS_BEFORE).train()
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
    """Makes six samples as a data set returns them. In samples for detectors, each box is filled with a
    gray, so that the picture shows the object."""
    from tools import zoo

    samples = []
    for seed in range(3):
        batch = zoo.raw_batch(cfg, model, size, seed=seed)
        for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
            boxes = sample.gt_instances.bboxes if cfg.get('default_scope') == 'mmdet' else ()
            for box in getattr(boxes, 'tensor', boxes):
                x1, y1, x2, y2 = (max(0, int(side)) for side in box)
                image[:, y1:y2, x1:x2] = 60 * seed + 40
            samples.append({'inputs': image, 'data_samples': sample})
    return samples


def runner_of(
    model,
    scope: str,
    samples: list[dict],
    folder: Path,
    row: dict,
    keep_flops: float,
    stop_after: int,
    checkpoint: str | None = None,
) -> Any:
    """Makes a Runner that trains until ``stop_after`` cuts were made.

    Args:
        model: the model to train, on the CPU.
        scope: the default scope of the model's config.
        samples: the samples of the data set.
        folder: the work directory of the run.
        row: the row of the family, which gets the losses, the number of cuts, and the warnings.
        keep_flops: the fraction of FLOPs that remains.
        stop_after: the number of cuts. After it, a run without ``checkpoint`` saves ``interrupted.pth``
            and raises :class:`Interrupted`. A run with ``checkpoint`` ends one iteration later.
        checkpoint: the file to resume from; ``None`` starts a new training.
    """
    import logging

    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from mmprune.mm import PruneHook

    class Watch(Hook):
        priority = 'LOWEST'
        ends = False

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            row['losses'].append(float(outputs['loss']))
            cuts = next(hook for hook in runner.hooks if isinstance(hook, PruneHook)).cuts
            row['resumed'] += cuts - row['cuts'] if checkpoint is not None else 0
            row['cuts'] = cuts
            if cuts >= stop_after and checkpoint is None:
                runner.save_checkpoint(str(folder), 'interrupted.pth', by_epoch=False)
                raise Interrupted
            runner.train_loop.stop_training = self.ends
            self.ends = cuts >= stop_after

    class KeepWarnings(logging.Handler):
        def emit(self, record):
            if '/mmprune/' in record.pathname:
                row['warnings'].append(record.getMessage())

    optimizer = dict(type='SGD', **OPTIMIZER)
    runner = Runner(
        model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=min(2, len(samples)),
            dataset=samples,
            collate_fn=dict(type='pseudo_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=ITERATIONS),
        optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer, clip_grad=dict(max_norm=1.0)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[PruneHook(keep_flops=keep_flops, interval=1, steps=CUTS), Watch()],
        load_from=checkpoint,
        resume=checkpoint is not None,
        log_level='WARNING',
        default_scope=scope,
        randomness=dict(seed=0),
        experiment_name=f'{folder.name}_{stop_after}',
        cfg=Config(),
    )
    for logger in (runner.logger, logging.getLogger('mmprune')):
        logger.addHandler(KeepWarnings(logging.WARNING))
    return runner


def train_plainly(config: str, arguments: dict, row: dict, at: Callable) -> None:
    """Trains in a plain loop with a ``Pruner``. The last cut is made in a model that was saved and
    loaded again."""
    import torch

    import mmprune
    from mmprune.nested import tensors_in
    from tools import zoo

    at('build')
    model, forward = zoo.build(config, **arguments)
    at('first run')

    def to_loss(model, _):
        return sum(tensor.float().square().mean() for tensor in tensors_in(forward(model)))

    for resumed, cuts in ((False, CUTS_BEFORE), (True, CUTS - CUTS_BEFORE)):
        if resumed:
            saved = {'structure': mmprune.save_model_def(model), 'weights': model.state_dict()}
            model = mmprune.load_model_def(zoo.bare(config), saved)
            model.load_state_dict(saved['weights'])
            zoo.at_size(model, arguments.get('size', 96))
            at('resumed run')
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, **OPTIMIZER)
        pruner = mmprune.Pruner(model, compensate=True)
        for step in range(2 * cuts + 1):  # steps of the optimizer, with a cut after each but the last
            if step % 2:
                result = pruner.rebuild_model(None, to_loss, optimizer, prune_num=24)
                row['cuts'] += result.units > 0
                row['resumed'] += resumed and result.units > 0
                continue
            loss = to_loss(model, None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            row['losses'].append(float(loss))
        pruner.close()


# -- all families ---------------------------------------------------------------------------------


def train(name: str, config: str, arguments: dict, limit: int, row: dict) -> dict:
    """Trains a family in a separate process.

    Args:
        name: the name of the family.
        config: the name of its config.
        arguments: further arguments of :func:`tools.zoo.build`.
        limit: the longest time in seconds.
        row: the row of ``tools/coverage.py`` for the family.

    Returns:
        The result of the training, for the entry ``'training'`` of the row.
    """
    start = time.monotonic()
    if not config.startswith('torchvision'):
        arguments = arguments | {'keep_flops': budget_of(row)}
    result = coverage.run(name, config, arguments, limit, examine)
    result = {key: value for key, value in result.items() if key not in ('name', 'config')}
    return result | {'seconds': round(time.monotonic() - start)}


def budget_of(row: dict) -> float:
    """Returns the fraction of FLOPs that a training of the family keeps.

    The fraction is one half if the cut of 30 % of the channels left little more than that. Otherwise it
    is a little more than the fraction that this cut left, so that the training can reach it.
    """
    kept = row.get('flops_kept', 0)
    return KEEP_FLOPS if kept < 0.55 else round(min(0.95, kept + 0.05), 2)


def keep(name: str, result: dict) -> None:
    """Writes a result to the JSON file, into the row that ``tools/coverage.py`` made."""
    rows = json.loads(coverage.RESULTS.read_text())
    next(row for row in rows if row['name'] == name)['training'] = result
    coverage.RESULTS.write_text(json.dumps(rows, indent=1) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns of names, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='number of processes at a time')
    parser.add_argument(
        '--limit', type=int, default=300, help='the longest time for a family, in seconds'
    )
    parser.add_argument('--resume', action='store_true', help='skip families that have a result')
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
            result = future.result()
            print(f'{name:36s} {result["seconds"]:4d} s  {coverage.training_cell(result)}', flush=True)
            keep(name, result)
    coverage.write_page(json.loads(coverage.RESULTS.read_text()), coverage.PAGE)


if __name__ == '__main__':
    main()
