"""What tools/analyze.py computes, on a model of a second: every figure, every refusal."""

import io
import json
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from rich.console import Console
from torch.nn import functional as F

import mmprune
from mmprune.mm.analysis import page, show, values
from mmprune.mm.analysis.run import FILE, Options, analyze_config, duration, write
from mmprune.mm.pages import render
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
    assert write(content, tmp_path / 'new') == tmp_path / 'new' / FILE
    assert json.loads((tmp_path / 'new' / FILE).read_text()) == json.loads(json.dumps(content))
    graph = content['groups']
    assert {group['name'] for group in graph} >= {'stem.0.weight', 'neck.weight', 'block.0.weight'}
    assert content['counted_as'] == 'one image of 12 x 12' and content['mode'] == 'tensor'
    assert content['seconds'] == pytest.approx(sum(layer['seconds'] for layer in content['layers']))
    assert any('output of the model' in lock['reasons'][0] for lock in content['locks'])
    assert 0 < content['floors'][0]['keep_flops'] < 0.2
    assert any('evaluations of the loss on 2 batches of validation data: about' in t for t in told)


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


def test_a_suggestion_pasted_into_the_config_prunes(trained, found, tmp_path):
    cfg, dense, _ = trained
    made = found[0]['suggestion']
    text = Config(cfg.to_dict()).pretty_text + '\n' + made['snippet']
    pasted = Config.fromstring(text, '.py')
    hook = pasted.custom_hooks[0]
    assert hook.keep_flops == made['options']['keep_flops'] < 1
    pasted.update(work_dir=str(tmp_path), experiment_name='pasted', load_from=dense)
    hook.update(begin=0, end=0.5, steps=2)
    runner = hook_runs.train(pasted)
    plan = mmprune.plan_of(runner.model)
    left = plan.cuts[-1].flops / plan.cuts[-1].flops_before
    assert left <= hook.keep_flops + 1e-6
    for name in hook.get('lock', ()):
        assert name not in plan.keep


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


def test_a_loss_that_falls_when_the_network_breaks_gives_way_to_the_metric(trained):
    cfg, dense, _ = trained
    cfg = cfg.copy()
    cfg.model = dict(type='SureOfItself')
    told = []
    content = analyze_config(cfg, dense, Options(batches=1, fractions=(0.5,), times=False), told.append)
    assert content['sensitivity']['value'] == 'accuracy on the validation data'
    assert content['sensitivity']['higher_is_better'] and 0.5 < content['sensitivity']['base'] <= 1
    assert content['suggestion']['value'] <= 1
    note = 'the loss on 1 batch of validation data falls when the network is destroyed, .*; accuracy is'
    assert any(re.match(note, text) for text in content['notes'])
    assert any(re.match(note, text) for text in told)
    cfg.val_evaluator = None
    content = analyze_config(cfg, dense, Options(batches=1, fractions=(0.5,), times=False))
    assert content['sensitivity'] is None
    assert any('is destroyed' in text and 'there is no metric' in text for text in content['notes'])


@pytest.mark.parametrize(
    'metrics, main',
    [
        (
            {'coco/bbox_mAP_50': 0.5, 'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_copypaste': '0.3 0.5'},
            'coco/bbox_mAP',
        ),
        ({'pascal_voc/AP50': 0.5, 'pascal_voc/mAP': 0.3}, 'pascal_voc/mAP'),
        ({'AUC': 0.5, 'NME': 0.3}, 'AUC'),
        ({'mine': 0.5}, 'mine'),
    ],
)
def test_the_metric_that_says_most(monkeypatch, metrics, main):
    monkeypatch.setattr(values, '_metrics_of', lambda cfg, name: lambda model: metrics)
    assert values.main_metric(Config(), torch.nn.Linear(1, 1)) == main


def test_a_pruned_checkpoint_is_rebuilt(trained, found):
    cfg, _, pruned = trained
    content = analyze_config(cfg, pruned, Options(sensitivity=False, times=False))
    assert content['pruned']['flops'] < 0.7
    assert content['flops'] < found[0]['flops'] == content['unpruned_flops']
    assert content['floors'][0]['keep_flops'] == pytest.approx(
        found[0]['floors'][0]['keep_flops'], rel=0.2
    )
    assert 'pruned' in page.page_of(content).blocks[1].text


def test_without_a_checkpoint_there_are_no_sensitivities_and_that_is_said(trained):
    cfg, _, _ = trained
    content = analyze_config(cfg, None, Options(times=False))
    assert content['sensitivity'] is None and content['suggestion'] is None
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
    show.show(content, screen)
    shown, text = screen.file.getvalue(), render(page.page_of(content))
    for word in (
        'stem.0.weight',
        'output of the model',
        'keep_flops',
        'PruneHook',
        'may go',
        '70% left',
    ):
        assert word in shown, word
        assert word in text, word
    assert 'Every operation' in shown
    for section in ('costs', 'cuts', 'locks', 'floors', 'sensitivity', 'suggestion'):
        assert f'id="{section}"' in text


def test_the_page_of_a_static_analysis_and_of_one_with_unknown_operations(found):
    content, _ = found
    bare = {
        **content, 'sensitivity': None, 'suggestion': None, 'seconds': None, 'pruned': None,
        'layers': [{**layer, 'seconds': None} for layer in content['layers']],
        'parts': [{**part, 'seconds': None} for part in content['parts']],
        'unknown_ops': {'aten::<odd>': ['head']}, 'unused': ['a', 'b'], 'notes': ['<a note>'],
    }  # fmt: skip
    text = render(page.page_of(bare))
    assert 'aten::&lt;odd&gt;' in text and '&lt;a note&gt;' in text
    screen = Console(file=io.StringIO(), width=140)
    show.show(bare, screen)
    assert 'aten::<odd> in head' in screen.file.getvalue()


def test_words():
    assert [duration(s) for s in (0, 40, 700, 20000)] == [
        '2 seconds', '40 seconds', '12 minutes', '5.6 hours',
    ]  # fmt: skip
    assert higher_is_better('coco/bbox_mAP') and not higher_is_better('NME')
    assert higher_is_better('accuracy') and not higher_is_better('loss')
