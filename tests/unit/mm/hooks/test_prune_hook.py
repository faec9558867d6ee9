"""The hook in real runs of mmengine's Runner."""

import copy
import json

import pytest
import torch
from mmengine.runner import Runner

import mmprune
from mmprune.mm.checkpoint import plan_from, read_checkpoint
from mmprune.mm.hooks import PruneHook, running
from mmprune.surgery.meta import META
from tests.helpers.equality import assert_same
from tests.helpers.hook_runs import config, train


class Stop(Exception):
    """Ends a run in the middle, as a kill would."""


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('finished')
    return train(config(work_dir)), work_dir


def test_reaches_its_budget_and_writes_what_it_did(finished):
    runner, work_dir = finished
    history = mmprune.plan_of(runner.model).history
    assert [entry['iteration'] for entry in history] == [5, 10]
    assert history[-1]['flops'] / history[-1]['flops_before'] <= 0.5
    assert history[0]['flops'] / history[0]['flops_before'] > 0.5
    content = json.loads((work_dir / 'prune_report.json').read_text())
    assert content['flops']['after'] == history[-1]['flops']
    assert set(content['metrics']) == {'unpruned', 'pruned'}
    for part, widths in content['channels'].items():
        if part not in ('small', 'large'):  # their outputs are the model's
            assert widths['after'] < widths['before'], part
    scalars = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
    assert 'prune/flops' in scalars


def test_the_optimizer_goes_on_with_narrow_state(finished):
    runner, _ = finished
    state = runner.optim_wrapper.optimizer.state
    assert state
    for parameter, values in state.items():
        assert values['momentum_buffer'].shape == parameter.shape


def test_checkpoints_rebuild_from_the_unpruned_config(finished, tmp_path):
    runner, work_dir = finished
    path = work_dir / 'epoch_4.pth'
    model = mmprune.load_pruned(config(tmp_path), path)
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(x), runner.model.eval()(x))
    assert model.dataset_meta['classes'] == ('a', 'b', 'c', 'd')
    assert model.cfg.model.type == 'TwoBranch'
    assert plan_from(path).to_meta() == mmprune.plan_of(runner.model).to_meta()
    fused = mmprune.load_pruned(config(tmp_path), path, fuse=True)
    assert isinstance(fused.stem[1], torch.nn.Identity) and not fused.training
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_testing_and_tuning_rebuild_too(finished, tmp_path):
    runner, work_dir = finished
    path = str(work_dir / 'epoch_4.pth')
    cfg = config(tmp_path / 'test', custom_hooks=[dict(type='RebuildHook')])
    cfg.test_dataloader, cfg.test_cfg, cfg.test_evaluator = (
        cfg.val_dataloader,
        cfg.val_cfg,
        cfg.val_evaluator,
    )
    cfg.load_from = path
    tester = Runner.from_cfg(cfg)
    metrics = tester.test()
    content = json.loads((work_dir / 'prune_report.json').read_text())
    assert metrics['accuracy'] == pytest.approx(content['metrics']['pruned']['accuracy'])

    tuned = train(config(tmp_path / 'tune', epochs=1, load_from=path))
    assert shapes(tuned.model) == shapes(runner.model)
    assert len(mmprune.plan_of(tuned.model).history) == 2  # the budget was met, nothing more to cut


def test_a_run_resumed_before_its_first_cut_keeps_its_scores(tmp_path):
    cfg = config(tmp_path, epochs=2, hook=dict(keep_flops=0.5, interval=8, steps=1))
    whole = train(cfg)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    resumed = train(cfg, resume=True)
    assert mmprune.plan_of(resumed.model).keep == mmprune.plan_of(whole.model).keep
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    """Killed between two cuts, after the scores of the second began."""
    hook = dict(keep_flops=0.5, interval=10, steps=2)
    whole = train(config(tmp_path / 'whole', epochs=4, hook=hook))

    cfg = config(tmp_path / 'torn', epochs=4, hook=hook)
    runner = Runner.from_cfg(copy.deepcopy(cfg))

    def kill(runner, **kwargs):
        if runner.iter == 15:
            raise Stop

    runner.hooks[0].after_train_iter = kill
    runner.call_hook = lambda name, **k: (
        kill(runner) if name == 'before_train_iter' else None,
        Runner.call_hook(runner, name, **k),
    )[1]
    with pytest.raises(Stop):
        runner.train()
    resumed = train(cfg, resume=True)
    assert len(mmprune.plan_of(resumed.model).history) == 2
    assert mmprune.plan_of(resumed.model).keep == mmprune.plan_of(whole.model).keep
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    for values in resumed.optim_wrapper.optimizer.state.values():
        assert values['momentum_buffer'].abs().sum() > 0


def test_the_averaged_model_is_cut_too(tmp_path):
    for update_buffers in (False, True):
        cfg = config(tmp_path / str(update_buffers), epochs=2)
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers))
        runner = train(cfg)
        ema = next(h.ema_model for h in runner.hooks if hasattr(h, 'ema_model'))
        assert shapes(ema.module) == shapes(runner.model)
        assert mmprune.plan_of(ema.module).keep == mmprune.plan_of(runner.model).keep
        again = copy.deepcopy(cfg)
        again.train_cfg.max_epochs = 3
        resumed = train(again, resume=True)
        assert shapes(resumed.model) == shapes(runner.model)


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (dict(keep_flops=0), r'keep_flops=0 is outside \(0, 1\]'),
        (dict(keep_flops=1.5), r'keep_flops=1.5 is outside'),
        (dict(), 'no budget'),
        (dict(keep_flop=0.5), "unknown budget option 'keep_flop': did you mean keep_flops"),
        (dict(keep_flops=0.5, score='tailor'), "'tailor'"),
        (dict(keep_flops=0.5, interval=0), 'interval=0: must be an integer >= 1'),
        (dict(keep_flops=0.5, steps=True), 'steps=True'),
    ],
)
def test_bad_options_are_errors_at_once(options, told):
    with pytest.raises(mmprune.PruneError, match=told):
        PruneHook(**options)


@pytest.mark.parametrize('budget', ['keep_flops', 'latency', 'keep_params'])
def test_the_hook_scores_as_any_pruner_does(budget):
    assert PruneHook(**{budget: 0.5}).score == mmprune.Score('taylor_gate')
    assert PruneHook(**{budget: 0.5}, score='fisher').score == mmprune.Score('fisher')


def test_a_run_too_short_for_a_cut_is_an_error_before_it_starts(tmp_path):
    with pytest.raises(mmprune.PruneError, match='the first cut would come after iteration 100'):
        train(config(tmp_path, epochs=1, hook=dict(keep_flops=0.5, interval=100)))


def test_a_budget_below_the_floor_stops_the_run_uncut(tmp_path):
    cfg = config(tmp_path, hook=dict(keep_flops=0.01, interval=3, steps=1, min_channels=12))
    runner = Runner.from_cfg(cfg)
    wide = shapes(runner.model)
    with pytest.raises(mmprune.PruneError, match='below the floor 0.[0-9]+ .*min_channels=12'):
        runner.train()
    assert shapes(runner.model) == wide
    assert mmprune.plan_of(runner.model) is None


def test_a_budget_of_measured_time(tmp_path):
    """With a second target beside it, since times of a busy machine reach none for certain."""
    hook = dict(latency=0.9, keep_flops=0.7, interval=5, steps=1)
    history = mmprune.plan_of(train(config(tmp_path, epochs=1, hook=hook)).model).history
    assert 0 < history[0]['latency'] < 3
    assert history[0]['flops'] < history[0]['flops_before']


def test_a_budget_of_time_in_another_runtime(tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    hook = dict(latency=0.9, backend='onnxruntime', keep_flops=0.7, interval=5, steps=1)
    cfg = config(tmp_path, epochs=1, hook=hook)
    with pytest.raises(mmprune.PruneError, match="names no size .* take backend='eager'"):
        train(cfg)

    prepared = []
    monkeypatch.setattr(running, 'image_size', lambda cfg: (12, 12))  # the data set has no pipeline
    prepare = running.prepare_for_timing

    def noting(*args):
        network = prepare(*args)
        return lambda model: prepared.append(model) or network(model)

    def ratio(pruned, unpruned, *_):
        assert pruned() is not None and unpruned() is not None
        return 0.95

    monkeypatch.setattr(running, 'prepare_for_timing', noting)
    monkeypatch.setattr('mmprune.budget.measured.ratio_of', ratio)
    model = train(cfg).model
    (cut,) = mmprune.plan_of(model).cuts
    assert cut.latency == 0.95 and cut.flops < cut.flops_before
    assert prepared[0] is model and len(prepared) == 2  # the whole network, and what was chosen


def test_frozen_layers_stay_and_are_named(tmp_path):
    cfg = config(tmp_path, epochs=1, hook=dict(keep_flops=0.985, divisor=1, interval=5, steps=1))
    cfg.log_level = 'INFO'
    runner = Runner.from_cfg(cfg)
    for parameter in runner.model.block.parameters():
        parameter.requires_grad = False
    runner.train()
    keep = mmprune.plan_of(runner.model).keep
    # What frozen weights read stays: the stem's channels, and those inside the block.
    assert 'block.1.weight' not in keep
    assert 'stem.1.weight' not in keep
    assert 'neck.weight' in keep
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'block.0.weight is frozen' in log


def test_a_trace_waits_for_a_batch_that_runs_every_layer(tmp_path):
    cfg = config(tmp_path, epochs=3, model=dict(type='Sometimes', first=3))
    runner = train(cfg)
    neck = mmprune.plan_of(runner.model).keep['neck.weight'][0]
    assert runner.model.third.in_channels == len(neck) < 16


def test_layers_that_never_run_are_named(tmp_path):
    cfg = config(tmp_path, epochs=5, model=dict(type='Sometimes', first=1000))
    cfg.log_level = 'INFO'
    train(cfg)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'The traced runs do not use third (2 parameters), so it is not known which' in log


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    _, work_dir = finished
    cfg = config(tmp_path, load_from=str(work_dir / 'epoch_4.pth'))
    cfg.model.width = 20
    with pytest.raises(mmprune.PruneError, match=r'stem.0.weight: the plan has \(16, 3, 3, 3\)'):
        train(cfg)


def test_a_torn_file_is_refused(finished, tmp_path):
    _, work_dir = finished
    torn = tmp_path / 'torn.pth'
    torn.write_bytes((work_dir / 'epoch_4.pth').read_bytes()[:3000])
    with pytest.raises(mmprune.PruneError, match='torn.pth: '):
        mmprune.load_pruned(config(tmp_path), torn)
    with pytest.raises(mmprune.PruneError, match='no such checkpoint'):
        mmprune.load_pruned(config(tmp_path), tmp_path / 'none.pth')


def test_a_checkpoint_without_a_plan_is_refused_where_one_is_needed(finished, tmp_path):
    _, work_dir = finished
    content = read_checkpoint(work_dir / 'epoch_4.pth')
    del content['meta'][META]
    torch.save(content, tmp_path / 'bare.pth')
    with pytest.raises(mmprune.PruneError, match='has no plan'):
        mmprune.load_pruned(config(tmp_path), tmp_path / 'bare.pth')


def test_weights_that_do_not_fit_their_plan_are_refused(finished, tmp_path):
    _, work_dir = finished
    content = read_checkpoint(work_dir / 'epoch_4.pth')
    content['state_dict']['neck.weight'] = torch.zeros(16, 16, 1, 1)
    torch.save(content, tmp_path / 'wide.pth')
    with pytest.raises(mmprune.PruneError, match='neck.weight'):
        train(config(tmp_path, load_from=str(tmp_path / 'wide.pth')))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    torch.save({'state_dict': {}, 'meta': {}, 'evil': Evil()}, tmp_path / 'evil.pth')
    with pytest.raises(mmprune.PruneError, match='refused'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()
