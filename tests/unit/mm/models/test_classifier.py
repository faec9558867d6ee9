"""The classifier's modes, its auxiliary heads, and a run of mmengine's Runner."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmengine.structures import BaseDataElement

import mmprune
import mmprune.mm.demo.shapes
from mmprune.mm import cli
from mmprune.mm.demo.classification import Accuracy
from mmprune.mm.models.classifier import ImageClassifier
from tests.helpers.by_hand import assert_exact
from tools import zoo

CONFIGS = Path(__file__).parents[4] / 'configs'


def sample(label):
    found = BaseDataElement()
    found.set_field(label, 'gt_label')
    return found


def test_modes():
    model = ImageClassifier(dict(name='resnet18'), num_classes=5)
    images, samples = torch.randn(3, 3, 32, 32), [sample(i) for i in (0, 4, 2)]
    model.eval()
    scores = model(images)
    assert scores.shape == (3, 5)
    losses = model(images, samples, mode='loss')
    wanted = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 4, 2]))
    torch.testing.assert_close(losses['loss'], wanted)
    found = model(images, samples, mode='predict')
    torch.testing.assert_close(torch.stack([f.pred_score for f in found]), scores.softmax(1))
    assert [f.gt_label for f in found] == [0, 4, 2]
    with pytest.raises(mmprune.PruneError, match="mode='train'"):
        model(images, mode='train')


def test_unknown_networks_are_errors():
    with pytest.raises(mmprune.PruneError, match="net name='resnet'.*resnet_v2"):
        ImageClassifier(dict(name='resnet'), num_classes=5)
    with pytest.raises(mmprune.PruneError, match="net name='fcn_resnet50'"):
        ImageClassifier(dict(name='fcn_resnet50'), num_classes=5)


def test_the_auxiliary_head_is_weighed_and_cut_exactly():
    torch.manual_seed(0)
    model = ImageClassifier(dict(name='googlenet', aux_logits=True), num_classes=5)
    images, samples = torch.randn(2, 3, 128, 128), [sample(1), sample(3)]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def loss(m):
        return m(images, samples, mode='loss')

    def with_aux(m):
        """As in training, batch norms aside."""
        m = copy.deepcopy(m).eval()
        m.net.training = True
        with torch.no_grad():
            return m(images)

    zoo.shake(model, loss)
    losses = loss(model)
    ratio = torch.nn.functional.cross_entropy
    _, aux2, aux1 = with_aux(model)
    labels = torch.tensor([1, 3])
    model.eval()
    model.net.training = True
    wanted = 0.3 * (ratio(aux1, labels) + ratio(aux2, labels))
    torch.testing.assert_close(loss(model)['loss_aux'], wanted)
    model.train()

    original = copy.deepcopy(model)
    plan = mmprune.prune(model, loss, keep_channels=0.7)
    assert 'loss_aux' in losses
    heads = [name for name in plan.keep if '.aux1.' in name or '.aux2.' in name]
    assert any('conv' in name for name in heads) and any('fc1' in name for name in heads)
    assert_exact(original, model, plan, with_aux, 1e-5)


def test_accuracy_counts_ranks():
    metric = Accuracy(topk=(1, 2))
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    metric.process(
        None, [dict(pred_score=s, gt_label=g) for s, g in zip(scores, (1, 1, 0), strict=True)]
    )
    found = metric.evaluate(size=3)
    assert found['accuracy/top1'] == pytest.approx(100 / 3)
    assert found['accuracy/top2'] == pytest.approx(100)


@pytest.mark.slow
def test_the_runner_trains_and_prunes_it(tmp_path, monkeypatch):
    monkeypatch.setenv('MMPRUNE_SHAPES', str(tmp_path / 'shapes'))
    mmprune.mm.demo.shapes.generate(tmp_path / 'shapes', train=40, val=12, size=64)
    config = zoo.load(str(CONFIGS / 'classification' / 'squeezenet_prune.py'))
    config.work_dir = str(tmp_path / 'work')
    config.train_cfg.max_epochs = 2
    config.train_dataloader.update(num_workers=0, persistent_workers=False)
    config.val_dataloader.update(num_workers=0, persistent_workers=False)
    config.custom_hooks[0].update(begin=1, end=None, interval=1, steps=3)
    runner = cli.build_runner(config)
    runner.train()
    report = json.loads((tmp_path / 'work' / 'prune_report.json').read_text())
    assert 'accuracy/top1' in json.dumps(report)
    plan = mmprune.plan_of(runner.model)
    assert plan.history[-1]['flops'] <= 0.5 * plan.history[0]['flops_before']
