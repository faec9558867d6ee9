"""Runs of several gloo processes on the CPU."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mmprune
from mmprune import session
from mmprune.compensation import fit
from mmprune.distributed import all_gather, broadcast, raise_together, rebuild_reducers
from mmprune.mm.hooks import PruneHook
from mmprune.mm.wrappers import PrunableDistributedDataParallel
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train
from tests.helpers.processes import spawn
from tests.unit.mm.hooks import test_distill  # noqa: F401  (registers WithFeatures and NotesLosses)

ROOT = Path(__file__).parents[2]


def distributed(folder: Path, batch_size: int = 4, **more: Any) -> Any:
    """The config of a run with a launcher, as ``tools/train.py`` makes it."""
    cfg = config(folder, **more)
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(type='PrunableDistributedDataParallel', broadcast_buffers=False)
    cfg.train_dataloader.batch_size = batch_size
    return cfg


HOOK = dict(keep_flops=0.5, interval=4, steps=2)
WHOLE = dict(HOOK, samples=8, validate_first=False)
"""Each cut sees all of a batch, however many processes share it; norms are as ``Evaluating`` leaves
them."""


def evaluated(cfg: Any) -> Runner:
    """A run whose batch norms take their own statistics, so that the split of a batch is not felt."""
    cfg.custom_hooks.insert(0, dict(type='Evaluating'))
    return train(cfg)


@HOOKS.register_module(force=True)
class Evaluating(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in runner.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def whole_run(folder: Path, compensate: bool = False) -> dict[str, Any]:
    """28 iterations with cuts after the 4th and 8th: 20 steps are done after the last."""
    cfg = distributed(folder, epochs=5, hook=dict(WHOLE, compensate=compensate))
    cfg.train_dataloader.batch_size = 8 // dist.get_world_size()
    runner = evaluated(cfg)
    model = runner.model.module
    return {
        'meta': mmprune.plan_of(model).to_meta(),
        'state': model.state_dict(),
        'iterations': runner.iter,
        'report': (folder / 'prune_report.json').is_file(),
        'momentum': [s['momentum_buffer'] for s in runner.optim_wrapper.optimizer.state.values()],
    }


@pytest.mark.parametrize('count', [2, 4])
def test_every_rank_cuts_alike_and_as_one_process_would(tmp_path, count):
    found = spawn(whole_run, count, tmp_path)

    first = found[0]
    assert first['iterations'] == 30
    assert len(first['meta']['history']) == 2
    for other in found[1:]:
        for part in ('meta', 'state', 'momentum'):
            assert_same(first[part], other[part])
    alone = evaluated(config(tmp_path / 'alone', epochs=5, hook=dict(WHOLE, compensate=False)))
    plan = mmprune.plan_of(alone.model).to_meta()
    assert plan['keep'] == first['meta']['keep']
    assert [e['units_removed'] for e in plan['history']] == [
        e['units_removed'] for e in first['meta']['history']
    ]
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(tensor, first['state'][name], rtol=1e-3, atol=1e-4), name


def test_every_rank_compensates_alike(tmp_path):
    """One process takes other positions of its batch into the fit than two do of theirs, so its weights
    differ a little, and only the ranks are compared."""
    first, second = spawn(compensated_run, 2, tmp_path)
    for part in ('meta', 'state', 'momentum'):
        assert_same(first[part], second[part])
    plain = spawn(whole_run, 2, tmp_path / 'plain')[0]
    assert plain['meta']['history'][0] == first['meta']['history'][0]
    assert not torch.equal(plain['state']['neck.weight'], first['state']['neck.weight'])


def compensated_run(folder: Path) -> dict[str, Any]:
    return whole_run(folder, compensate=True)


def disagreeing_run(folder: Path) -> None:
    make_plan = session.make_plan  # patched: all ranks come to one plan, whatever one does to them

    def other_plan(traced, model, keep, *args, **kwargs):
        if dist.get_rank() == 1:
            keep = keep.copy()
            keep[keep.argmax()] = False
        return make_plan(traced, model, keep, *args, **kwargs)

    session.make_plan = other_plan
    runner = Runner.from_cfg(distributed(folder, hook=HOOK))
    try:
        runner.train()
    finally:
        assert mmprune.plan_of(runner.model.module) is None


def test_a_plan_that_differs_on_one_rank_stops_all_uncut(tmp_path):
    told = spawn(disagreeing_run, 2, tmp_path)
    for text in told:
        assert text.startswith('PruneError: the plan differs on rank 1 of 2 from that of rank 0')


def failing_run(folder: Path, where: str) -> None:
    real = getattr(session, where)

    def fail(*args, **kwargs):
        if dist.get_rank() == 1:
            raise mmprune.PruneError('out of luck')
        return real(*args, **kwargs)

    setattr(session, where, fail)
    train(distributed(folder, hook=HOOK))


@pytest.mark.parametrize('where', ['make_plan', 'check_cut', 'cut'])
def test_a_failure_on_one_rank_stops_all(tmp_path, where):
    first, second = spawn(partial(failing_run, where=where), 2, tmp_path)
    assert second == 'PruneError: out of luck'
    assert first.endswith('failed on rank 1 of 2, so it is not done on any: PruneError: out of luck')


def uncompensated_run(folder: Path) -> dict[str, Any]:
    def fail(*args, **kwargs):
        if dist.get_rank() == 1:
            raise mmprune.PruneError('out of luck')

    fit._measure_errors = fail  # patched: no data makes one rank alone fail there
    runner = train(distributed(folder, hook=HOOK))
    model = runner.model.module
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {'cuts': len(mmprune.plan_of(model).history)} | weights


def test_a_compensation_that_fails_on_one_rank_is_left_out_on_all(tmp_path):
    first, second = spawn(uncompensated_run, 2, tmp_path)
    assert first['cuts'] == 2
    assert_same(first, second)


def taught_run(folder: Path) -> dict[str, Any]:
    cfg = distributed(folder, epochs=2, hook=HOOK | dict(distill=True))
    cfg.model.type = 'WithFeatures'
    cfg.custom_hooks.append(dict(type='NotesLosses'))
    runner = train(cfg)
    watch = next(hook for hook in runner.hooks if type(hook).__name__ == 'NotesLosses')
    return {
        'weights': {name: p.detach() for name, p in runner.model.module.named_parameters()},
        'taught': ['loss_distill_neck' in losses for losses in watch.losses],
    }


def test_every_rank_is_taught_and_has_the_same_weights(tmp_path):
    first, second = spawn(taught_run, 2, tmp_path)
    assert_same(first, second)
    assert first['taught'] == [False] * 4 + [True] * 8


def resumed_run(folder: Path) -> dict[str, Any]:
    cfg = distributed(folder, epochs=3, hook=HOOK)
    train(cfg)
    again = cfg.copy()
    again.train_cfg.max_epochs = 4
    runner = train(again, resume=True)
    return {'state': runner.model.module.state_dict(), 'iterations': runner.iter}


def test_a_distributed_run_resumes_pruned(tmp_path):
    found = spawn(resumed_run, 2, tmp_path)
    assert found[0]['iterations'] == 24
    assert len(mmprune.mm.checkpoint.plan_from(tmp_path / 'epoch_4.pth').history) == 2
    for name, tensor in found[0]['state'].items():
        if not name.endswith(('running_mean', 'running_var')):  # of each rank's own data
            assert torch.equal(tensor, found[1]['state'][name]), name


def scored_run(folder: Path) -> dict[str, Any]:
    found = {}
    for score in ('taylor_activation', 'l2', 'random'):
        cfg = distributed(folder / score, epochs=2, hook=HOOK | dict(score=score))
        cfg.randomness.diff_rank_seed = True
        cfg.custom_hooks.insert(0, dict(type='Noting', after=7))
        runner = train(cfg)
        keep = mmprune.plan_of(runner.model.module).keep
        noting = next(hook for hook in runner.hooks if isinstance(hook, Noting))
        found[score] = {'keep': keep, 'scores': noting.scores}
    return found


@HOOKS.register_module(force=True)
class Noting(Hook):
    """Keeps the scores of one iteration."""

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.after - 1:
            pruning = next(hook for hook in runner.hooks if isinstance(hook, PruneHook))
            self.scores = torch.from_numpy(pruning.scoring.collector.scores())


def test_scores_of_single_examples_are_those_of_all_ranks(tmp_path):
    first, second = spawn(scored_run, 2, tmp_path)
    for score in ('taylor_activation', 'l2'):
        assert torch.equal(first[score]['scores'], second[score]['scores']), score
    assert not torch.equal(first['random']['scores'], second['random']['scores'])
    for score in first:
        assert first[score]['keep'] == second[score]['keep']


# -- plain DistributedDataParallel ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(3, 3)
        self.register_buffer('seen', torch.zeros(1))

    def forward(self, x):
        self.seen += 1 + dist.get_rank()
        return self.b(self.a(x).relu())


def halve(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook that can be told from none: it averages and takes half."""
    state.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(None, bucket).then(lambda done: done.value() / 2)


def plain_loop(folder: Path, options: dict, comm: str = '') -> dict:
    torch.manual_seed(0)
    net = Net()
    if not options.get('find_unused_parameters') and not options.get('static_graph'):
        del net.unused
    if comm == 'fp16':  # torch itself keeps no note of it
        ddp = PrunableDistributedDataParallel(net, device_ids=[0], **options)
    else:
        ddp = DistributedDataParallel(net, **options)
    state: list[int] = []
    if comm == 'halve':
        ddp.register_comm_hook(state, halve)
    if comm == 'fp16':
        ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())
    before = {
        k: getattr(ddp, k)
        for k in (
            'find_unused_parameters',
            'static_graph',
            'forward_sync_buffers',
            'gradient_as_bucket_view',
            'bucket_bytes_cap',
        )
    }
    for step in range(8):
        x, y = torch.randn(4, 6, generator=generator), torch.randn(4, 2, generator=generator)
        loss = (ddp(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 5:
            grad = net.a.weight.grad.clone()
            expected = torch.autograd.grad((net(x) - y).square().mean(), net.a.weight)[0]
            dist.all_reduce(expected)
            expected = expected / 2 / (2 if comm == 'halve' else 1)
        optimizer.step()
        if step in (2, 4):  # a reducer is made anew twice, the loss's graph of before alive
            plan = mmprune.prune(
                net, lambda m: m(torch.zeros(2, 6)), prune_num=2, divisor=1, optimizer=optimizer
            )
            assert rebuild_reducers(ddp) == 1
    assert before == {key: getattr(ddp, key) for key in before}
    state_numel = state[-1] if state else None
    return {
        'state': net.state_dict(),
        'grad': grad,
        'expected': expected,
        'plan': plan.keep,
        'numel': state_numel,
    }


@pytest.mark.parametrize(
    ('options', 'comm'),
    [
        ({}, ''),
        ({}, 'halve'),
        ({}, 'fp16'),
        (dict(find_unused_parameters=True, gradient_as_bucket_view=True), ''),
        (dict(static_graph=True, forward_sync_buffers=False), ''),
        (dict(bucket_cap_mb=1e-5), ''),
    ],
)
def test_a_plain_ddp_loop_goes_on_with_the_same_settings(tmp_path, options, comm):
    first, second = spawn(partial(plain_loop, options=options, comm=comm), 2, tmp_path)
    assert first['state']['a.weight'].shape == (4, 6)
    assert first['plan'] == second['plan']
    seen = tuple(int(each['state'].pop('seen')) for each in (first, second))
    assert_same(first['state'], second['state'])
    # Rank 1 adds 2 in each of its 9 forwards, and before each of 8 it gets rank 0's, which adds 1.
    last = 10 if options.get('forward_sync_buffers', True) else 18
    assert seen == (9, last)
    rounded = first['grad'].half().float()
    assert torch.equal(first['grad'], rounded) == (comm == 'fp16')
    close = 1e-3 if comm == 'fp16' else 1e-6
    assert torch.allclose(first['grad'], first['expected'], atol=close)
    assert torch.equal(first['grad'], second['grad'])
    if comm == 'halve':
        assert first['numel'] == 4 * 6 + 4 + 2 * 4 + 2


def pruner_loop(folder: Path, wrong: bool = False) -> dict:
    """The loop of the first users, each rank with batches of its own."""
    torch.manual_seed(0)
    net = Net()
    del net.unused
    ddp = DistributedDataParallel(net)
    pruner = mmprune.Pruner(ddp, distributed=True, divisor=1)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(dist.get_rank())

    def to_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        if wrong and dist.get_rank() == 1:
            raise ValueError('no such batch')
        return (model(batch[0]) - batch[1]).square().mean()

    removed = []
    for step in range(24):
        batch = [torch.randn(4, size, generator=generator) for size in (6, 2)]
        if (step + 1) % 6 == 0 and step < 12:
            removed.append(pruner.rebuild_model(batch, to_loss, optimizer, 2).units)
            continue
        loss = (ddp(batch[0]) - batch[1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {'state': net.state_dict(), 'plan': mmprune.plan_of(net).keep, 'removed': removed}


def test_pruner_in_a_plain_ddp_loop(tmp_path):
    first, second = spawn(pruner_loop, 2, tmp_path)
    assert first['removed'] == second['removed'] == [2, 2]
    assert first['plan'] == second['plan']
    assert first['state']['a.weight'].shape == (4, 6)
    for each in (first, second):
        del each['state']['seen']  # of each rank's own forwards
    assert_same(first['state'], second['state'])


def test_pruner_stops_all_processes_when_one_fails(tmp_path):
    first, second = spawn(partial(pruner_loop, wrong=True), 2, tmp_path)
    assert first.startswith('PruneError: the trace failed on rank 1 of 2') and 'no such batch' in first
    assert second.startswith('PruneError') and 'no such batch' in second


def unsaid(folder: Path) -> None:
    mmprune.Pruner(DistributedDataParallel(nn.Linear(2, 2)))


def test_pruner_wants_to_know_of_processes(tmp_path):
    for told in spawn(unsaid, 2, tmp_path):
        assert 'distributed=True' in told


def fsdp_like() -> nn.Module:
    return type('FullyShardedDataParallel', (nn.Module,), {})()


def test_what_cannot_follow_a_cut_is_refused_beforehand():
    with pytest.raises(mmprune.PruneError, match='FullyShardedDataParallel shards parameters'):
        mmprune.distributed.check_rebuildable(nn.Sequential(fsdp_like()))
    assert rebuild_reducers(nn.Linear(2, 2)) == 0


def test_alone_the_same_calls_do_nothing():
    assert broadcast(3) == 3
    assert all_gather('a') == ['a']
    with pytest.raises(ValueError, match='mine'), raise_together('it'):
        raise ValueError('mine')


def test_the_script_runs_it(tmp_path):
    """tools/dist_train.sh, torchrun and --launcher, from a config file, with --amp."""
    cfg = config(tmp_path, epochs=3, hook=HOOK)
    cfg.custom_imports = dict(imports=['mmprune', 'tests.helpers.hook_runs'])
    cfg.dump(tmp_path / 'cfg.py')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            ROOT / 'tools' / 'dist_train.sh',
            tmp_path / 'cfg.py',
            '2',
            '--work-dir',
            tmp_path / 'out',
            '--amp',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(PYTHON=sys.executable, PORT=str(port), PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-9000:]
    plan = mmprune.mm.checkpoint.plan_from(tmp_path / 'out' / 'epoch_3.pth')
    assert len(plan.history) == 2
    assert done.stdout.count('│ FLOPs') == 1  # told once, by the first process
