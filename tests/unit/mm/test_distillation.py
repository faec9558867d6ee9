"""The unpruned network teaches the pruned one: the same channels on the same images."""

import copy

import pytest
import torch

import mmprune
from mmprune.mm.distillation import Distillation, feature_loss, features_of
from tests.helpers.by_hand import masked_by_hand
from tools.zoo import bare, build, load

OWN, POSE = 'configs/_base_', 'mmpose::body_2d_keypoint'
FEATURES = {
    f'{OWN}/faster_rcnn_shapes.py': 'neck',
    f'{OWN}/simple_baseline_shapes.py': 'backbone',
    f'{OWN}/hourglass_shapes.py': 'backbone',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': 'neck',
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py': 'neck',
    f'{POSE}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py': 'backbone',
}


def student_of(config):
    """(the pruned model in evaluation mode, its masked original, its run)."""
    model, forward = build(load(config), size=64, mode='loss')
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.7, score='l2', check=False)
    teacher = masked_by_hand(original, plan.keep)
    return model.eval(), teacher.eval().requires_grad_(False), forward


def taught_by(model, teacher, weight=1.0):
    return Distillation(model, teacher, torch.rand(1, 3, 64, 64), weight)


def disturb(teacher):
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape))


@pytest.mark.slow
@pytest.mark.parametrize('config', FEATURES)
def test_a_student_that_knows_all_is_taught_nothing(config):
    """The teacher whose lost channels are masked computes what the student does."""
    model, teacher, forward = student_of(config)
    key = f'loss_distill_{FEATURES[config]}'
    own = set(forward(model))
    taught = taught_by(model, teacher)
    taught.armed = True
    losses = forward(model)
    assert set(losses) == own | {key}
    assert losses[key].requires_grad and losses[key].item() == pytest.approx(0, abs=1e-4)
    disturb(teacher)
    taught.armed = True
    loss = forward(model)[key]
    assert loss.item() > 1e-4
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    taught.close()
    taught.armed = True
    assert set(forward(model)) == own


def test_one_run_of_the_loss_is_taught_for_each_time_it_is_armed():
    model, teacher, forward = student_of(f'{OWN}/simple_baseline_shapes.py')
    taught = taught_by(model, teacher)

    def added(mode='loss'):
        return [key for key in forward(model, mode=mode) if 'distill' in str(key)]

    assert not added()
    taught.armed = True
    forward(model, mode='tensor')
    assert added() == ['loss_distill_backbone'] and not added()


def test_a_run_that_fails_leaves_the_next_one_alone():
    model, teacher, forward = student_of(f'{OWN}/simple_baseline_shapes.py')
    taught = taught_by(model, teacher)
    taught.armed = True
    with pytest.raises(TypeError):
        model(inputs=torch.rand(1, 3, 64, 64), mode='loss', no_such_argument=1)
    assert not [key for key in forward(model) if 'distill' in key]


def test_a_copy_of_the_student_does_not_copy_the_teacher():
    model, teacher, _ = student_of(f'{OWN}/simple_baseline_shapes.py')
    taught_by(model, teacher)
    clone = copy.deepcopy(model)
    (hook,) = clone.backbone._forward_hooks.values()
    assert hook in model.backbone._forward_hooks.values()


@pytest.mark.parametrize('config', [f'{OWN}/simple_baseline_shapes.py', f'{OWN}/faster_rcnn_shapes.py'])
def test_the_loss_is_in_proportion_to_the_losses_of_the_model(config):
    """So that it does not drown the loss of heatmaps, which is a thousandth of that of boxes."""
    model, teacher, forward = student_of(config)
    disturb(teacher)
    taught = taught_by(model, teacher, weight=2.0)

    def added():
        taught.armed = True
        torch.manual_seed(0)  # regions are drawn
        losses = forward(model)
        (loss,) = (v.item() for k, v in losses.items() if 'distill' in k)
        total = model.parse_losses({k: v for k, v in losses.items() if 'distill' not in k})[0].item()
        return total, loss

    total, plain = added()
    assert 0 < plain / total < 2 * 2  # 1 - r is at most 2
    parse = model.parse_losses
    model.parse_losses = lambda losses: (-7 * parse(losses)[0], {})  # as a log likelihood may be
    assert added()[1] == pytest.approx(7 * plain, rel=1e-3)


def test_features_are_compared_by_their_correlation():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, c, 5, 4, generator=generator) for c in (3, 6))
    kept = torch.tensor([0, 3, 5])
    rows = [t.transpose(0, 1).flatten(1) for t in (student, teacher[:, kept])]
    r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)]
    wanted = (1 - torch.stack(r)).mean()
    torch.testing.assert_close(feature_loss(student, teacher, 1, kept), wanted, rtol=1e-3, atol=1e-3)
    moved = feature_loss(student.movedim(1, 3), teacher.movedim(1, 3), 3, kept)
    torch.testing.assert_close(moved, feature_loss(student, teacher, 1, kept))
    scaled = feature_loss(3 * teacher + 1, teacher, 1, None)
    assert scaled.item() == pytest.approx(0, abs=1e-4)


def test_training_on_the_loss_brings_the_features_to_those_of_the_teacher():
    torch.manual_seed(0)
    student, teacher = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 6, 3).requires_grad_(False)
    kept, images = torch.tensor([0, 2, 3, 5]), torch.randn(8, 3, 9, 9)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        loss = feature_loss(student(images), teacher(images), 1, kept)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.5 and losses[-1] < 0.01


def test_queries_are_taught_by_features():
    assert features_of(bare('mmdet::detr/detr_r50_8xb2-150e_coco.py')) == 'neck'


def test_a_model_without_features_can_not_be_taught():
    with pytest.raises(mmprune.PruneError, match='Linear has no neck or backbone'):
        features_of(torch.nn.Linear(2, 2))
