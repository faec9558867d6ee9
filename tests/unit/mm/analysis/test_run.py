"""What tools/analyze.py computes, on a model of a second: every figure, every refusal."""

import io
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from rich.console import Console
from torch.nn import functional as F

import mmprune
from mmprune.mm.analysis import analysis_page
from mmprune.mm.analysis.run import ANALYSIS_FILE, Options, analyze_config, write
from mmprune.mm.pages import render
from mmprune.mm.pages.terminal import print_page
from mmprune.mm.report import higher_is_better
from tests.helpers import hook_runs


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(config, unpruned checkpoint, pruned checkpoint)."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = hook_runs.config(folder / 'dense', epochs=8, custom_hooks=[])
    hook_runs.train(cfg)
    pruned = hook_runs.config(folder / 'pruned', epochs=3)
    hook_runs.train(pruned)
    return cfg, str(folder / 'dense/epoch_8.pth'), str(folder / 'pruned/epoch_3.pth')


@pytest.fixture(scope='module')
def found(trained):
    told = []
    cfg, dense, _ = trained
    content = analyze_config(cfg, dense, Options(batches=2), told.append)
    return content, told


def test_everything_is_there_and_is_plain_data(found, tmp_path):
    content, told = found
    assert write(content, tmp_path / 'new') == tmp_path / 'new' / ANALYSIS_FILE
    assert json.loads((tmp_path / 'new' / ANALYSIS_FILE).read_text()) == json.loads(json.dumps(content))
    graph = content['groups']
    assert {group['name'] for group in graph} >= {'stem.0.weight', 'neck.weight', 'block.0.weight'}
    assert content['counted_as'] == 'one image of 12 x 12'
    assert content['seconds'] == pytest.approx(sum(layer['seconds'] for layer in content['layers']))
    assert any('output of the model' in lock['reasons'][0] for lock in content['locks'])
    assert 0 < content['floors'][0]['keep_flops'] < 0.2
    assert any('evaluations of the loss on 2 batches of validation data' in t for t in told)


def test_sensitivities_are_of_the_loss_on_validation_data(trained, found):
    cfg, dense, _ = trained
    worth = found[0]['sensitivity']
    model = hook_runs.TwoBranch()
    model.load_state_dict(torch.load(dense, weights_only=True)['state_dict'])
    model.eval()
    loader = Runner.build_dataloader({**cfg.val_dataloader, 'num_workers': 0})
    with torch.no_grad():
        losses = [
            model(**batch, mode='loss')['loss'] for _, batch in zip(range(2), loader, strict=False)
        ]
    assert worth['base'] == pytest.approx(float(sum(losses)) / 2, rel=1e-4)
    assert worth['noise'] == 0 and not worth['higher_is_better']
    by_name = {group['name']: group for group in worth['groups']}
    assert by_name['neck.weight']['changes']['0.5'] > 0.05, 'all goes through the neck'


def test_a_metric_in_the_place_of_the_loss(trained):
    cfg, dense, _ = trained
    options = Options(batches=1, metric='accuracy', fractions=(0.5,), times=False)
    worth = analyze_config(cfg, dense, options)['sensitivity']
    assert worth['higher_is_better'] and 0.5 < worth['base'] <= 1
    assert all(
        group['changes']['0.5'] == pytest.approx((worth['base'] - v) / worth['base'])
        for group in worth['groups']
        if (v := group['values']['0.5']) is not None
    )


@MODELS.register_module(force=True)
class SureOfItself(hook_runs.TwoBranch):
    """Its loss is weighted by how sure it is, as that of RTMDet: a network without output has none."""

    def forward(self, inputs, labels=None, mode='tensor'):
        if mode != 'loss':
            return super().forward(inputs, labels, mode)
        logits = super().forward(inputs, labels, 'tensor')
        sure = logits.softmax(1).max(1).values.detach() - 0.25
        return {'loss': (sure * (1 + F.cross_entropy(logits, labels, reduction='none'))).mean()}


def test_a_loss_that_falls_when_the_network_breaks_judges_nothing(trained):
    cfg, dense, _ = trained
    cfg = cfg.copy()
    cfg.model = dict(type='SureOfItself')
    content = analyze_config(cfg, dense, Options(batches=1, fractions=(0.5,), times=False))
    assert content['sensitivity'] is None
    assert any('falls when the network is destroyed' in note for note in content['notes'])
    assert any('choose a metric with --metric' in note for note in content['notes'])


def test_a_pruned_checkpoint_is_rebuilt(trained, found):
    cfg, _, pruned = trained
    content = analyze_config(cfg, pruned, Options(sensitivity=False, times=False))
    assert content['pruned']['flops'] < 0.7
    assert content['flops'] < found[0]['flops'] == content['unpruned_flops']
    assert content['floors'][0]['keep_flops'] == pytest.approx(
        found[0]['floors'][0]['keep_flops'], rel=0.2
    )
    assert 'pruned' in analysis_page.page_of(content).blocks[1].text


def test_without_a_checkpoint_there_are_no_sensitivities_and_that_is_said(trained):
    cfg, _, _ = trained
    content = analyze_config(cfg, None, Options(times=False))
    assert content['sensitivity'] is None
    assert any('give a CHECKPOINT' in note for note in content['notes'])


def test_the_config_s_own_budget_has_a_floor_of_its_own(trained, tmp_path):
    cfg = hook_runs.config(tmp_path, hook=dict(keep_flops=0.5, min_channels=8, divisor=1))
    content = analyze_config(cfg, None, Options(times=False))
    assert content['floors'][1]['keep_flops'] > content['floors'][0]['keep_flops']
    assert content['floors'][1]['limits'] == {'min_channels': 8, 'divisor': 1}


@pytest.mark.parametrize(
    ('options', 'with_checkpoint', 'told'),
    [
        (dict(metric='accuracy'), False, 'give a CHECKPOINT'),
        (dict(metric='accuracy', data='random'), True, 'random pictures have no metric'),
        (dict(metric='accuracy', sensitivity=False), True, 'leave --static out'),
        (dict(metric='mAP', times=False, batches=1), True, 'evaluator of the config gives accuracy'),
        (dict(data='random'), False, 'take --data train'),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(trained, options, with_checkpoint, told):
    cfg, dense, _ = trained
    with pytest.raises(mmprune.PruneError, match=told):
        analyze_config(cfg, dense if with_checkpoint else None, Options(**options))


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        (dict(train_dataloader=None), 'no train_dataloader'),
        (dict(train_dataloader=dict(dataset=dict(type='Nowhere'))), 'data can not be read'),
        (dict(model=dict(type='Nothing')), 'can not be built'),
        (dict(custom_hooks=[dict(type='PruneHook', keep_flops=2)]), 'outside'),
    ],
)
def test_a_config_that_lacks_something_is_named(trained, changes, told):
    cfg = Config({**trained[0].to_dict(), **changes})
    with pytest.raises(mmprune.PruneError, match=told):
        analyze_config(cfg, None, Options(times=False))


def test_a_config_without_a_model(tmp_path):
    whole = hook_runs.config(tmp_path).to_dict()
    cfg = Config({key: value for key, value in whole.items() if key != 'model'})
    with pytest.raises(mmprune.PruneError, match='has no model'):
        analyze_config(cfg, None, Options())


def test_without_validation_data_the_loss_is_that_of_training_data(trained):
    cfg = Config({**trained[0].to_dict(), 'val_dataloader': None})
    content = analyze_config(cfg, trained[1], Options(batches=1, fractions=(0.5,), times=False))
    assert content['sensitivity']['value'] == 'the loss on 1 batch of training data'
    assert any('training data' in note for note in content['notes'])


def test_all_of_it_is_shown_in_the_terminal_and_on_the_page(found):
    content, _ = found
    screen = Console(file=io.StringIO(), width=140)
    print_page(analysis_page.page_of(content), screen)
    shown, text = screen.file.getvalue(), render(analysis_page.page_of(content))
    for word in (
        'stem.0.weight',
        'output of the model',
        'keep_flops',
        'may go',
        '70% left',
    ):
        assert word in shown, word
        assert word in text, word
    assert 'Every operation' in shown
    for section in ('costs', 'cuts', 'locks', 'floors', 'sensitivity'):
        assert f'id="{section}"' in text


def test_the_page_of_a_static_analysis_and_of_one_with_unknown_operations(found):
    content, _ = found
    bare = {
        **content, 'sensitivity': None, 'seconds': None, 'pruned': None,
        'layers': [{**layer, 'seconds': None} for layer in content['layers']],
        'parts': [{**part, 'seconds': None} for part in content['parts']],
        'unknown_ops': {'aten::<odd>': ['head']}, 'unused': ['a', 'b'], 'notes': ['<a note>'],
    }  # fmt: skip
    text = render(analysis_page.page_of(bare))
    assert 'aten::&lt;odd&gt;' in text and '&lt;a note&gt;' in text
    screen = Console(file=io.StringIO(), width=140)
    print_page(analysis_page.page_of(bare), screen)
    assert 'aten::<odd> in head' in ' '.join(screen.file.getvalue().split())


@pytest.mark.parametrize(
    ('metric', 'is_higher_better'),
    [('coco/bbox_mAP', True), ('accuracy', True), ('NME', False), ('loss', False)],
)
def test_which_metrics_are_better_where_they_are_higher(metric, is_higher_better):
    assert higher_is_better(metric) == is_higher_better
