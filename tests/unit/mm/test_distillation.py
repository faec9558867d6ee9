"""The unpruned network teaches the pruned one: the same channels, images and regions."""

import copy

import pytest
import torch
from torch.nn import functional

import mmprune
from mmprune.check.masked import masked
from mmprune.mm.distillation import (
    Lesson,
    Points,
    dense_loss,
    feature_loss,
    points_of,
    softmax_loss,
)
from tools.zoo import bare, build, load

OWN, POSE = 'configs/_base_', 'mmpose::body_2d_keypoint'
KINDS = {
    f'{OWN}/faster_rcnn_shapes.py': ('neck', {'cls'}),
    f'{OWN}/retinanet_shapes.py': ('neck', {'cls'}),
    f'{OWN}/rfcn_shapes.py': ('neck', set()),
    f'{OWN}/simple_baseline_shapes.py': ('backbone', {'heatmap'}),
    f'{OWN}/hourglass_shapes.py': ('backbone', {'heatmap'}),
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': ('neck', {'cls'}),
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': ('neck', {'cls'}),
    'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py': ('neck', set()),
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': ('neck', {'cls'}),
    f'{POSE}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py': ('backbone', {'simcc'}),
}  # fmt: skip


def student_of(config):
    """(the pruned model in evaluation mode, its masked original, its run)."""
    model, forward = build(load(config), size=64, mode='loss')
    original = copy.deepcopy(model)
    plan = mmprune.prune(model, forward, keep_channels=0.7, score='l2', check=False)
    return model.eval(), masked(original, plan).eval().requires_grad_(False), forward


def lesson(model, teacher, features=1.0, predictions=1.0):
    return Lesson(model, teacher, torch.rand(1, 3, 64, 64), features, predictions, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize('config', KINDS)
def test_a_student_that_knows_all_is_taught_nothing(config):
    """The teacher whose lost channels are masked computes what the student does."""
    model, teacher, forward = student_of(config)
    name, kinds = KINDS[config]
    own = set(forward(model))
    taught = lesson(model, teacher)
    taught.armed = True
    losses = forward(model)
    added = {key: loss for key, loss in losses.items() if key not in own}
    assert set(added) == {f'loss_distill_{kind}' for kind in {name, *kinds}}
    for key, loss in added.items():
        assert loss.requires_grad
        # What a quality focal loss leaves where both are equal is zero too.
        assert loss.item() == pytest.approx(0, abs=1e-4), key
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape))
    taught.armed = True
    losses = forward(model)
    assert all(losses[key].item() > 1e-4 for key in added), {k: losses[k] for k in added}
    sum(losses[key] for key in added).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    taught.close()
    taught.armed = True
    assert set(forward(model)) == own


def test_one_run_of_the_loss_is_taught_for_each_time_it_is_armed():
    model, teacher, forward = student_of(f'{OWN}/simple_baseline_shapes.py')
    taught = lesson(model, teacher)

    def added(mode='loss'):
        return [key for key in forward(model, mode=mode) if 'distill' in str(key)]

    assert not added()
    taught.armed = True
    forward(model, mode='tensor')
    assert len(added()) == 2 and not added()
    assert not taught.student.outputs and not taught.taught.outputs
    clone = copy.deepcopy(model)
    taught.armed = True
    assert sum(p is q for p, q in zip(clone.parameters(), teacher.parameters(), strict=True)) == 0


def test_predictions_can_be_left_out():
    model, teacher, forward = student_of(f'{OWN}/faster_rcnn_shapes.py')
    taught = lesson(model, teacher, predictions=0.0)
    taught.armed = True
    assert [key for key in forward(model) if 'distill' in key] == ['loss_distill_neck']
    taught.close()
    taught = lesson(model, teacher, features=0.0)
    taught.armed = True
    assert [key for key in forward(model) if 'distill' in key] == ['loss_distill_cls']


@pytest.mark.parametrize(
    ('config', 'in_their_own_unit'),
    [
        (f'{OWN}/simple_baseline_shapes.py', {'heatmap'}),
        (f'{OWN}/faster_rcnn_shapes.py', {'cls'}),
        pytest.param(
            f'{POSE}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py', set(), marks=pytest.mark.slow
        ),
    ],
)
def test_what_has_no_unit_counts_as_the_own_losses_do(config, in_their_own_unit):
    """So that features do not drown the loss of heatmaps, which is a thousandth of that of boxes."""
    model, teacher, forward = student_of(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.5 * torch.rand(parameter.shape))
    taught = lesson(model, teacher)

    def added():
        taught.armed = True
        torch.manual_seed(0)  # regions are drawn
        losses = forward(model)
        own = model.parse_losses({k: v for k, v in losses.items() if 'distill' not in k})[0].item()
        return own, {k: v.item() for k, v in losses.items() if 'distill' in k}

    own, plain = added()
    assert all(plain.values())
    parse = model.parse_losses
    model.parse_losses = lambda losses: (-7 * parse(losses)[0], {})  # as a log likelihood may be
    _, louder = added()
    for key, loss in plain.items():
        times = 1 if key.removeprefix('loss_distill_') in in_their_own_unit else 7
        assert louder[key] == pytest.approx(times * loss, rel=1e-3), key
    feature = next(loss for key, loss in plain.items() if key.endswith(('neck', 'backbone')))
    assert 0 < feature / own < 2


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


def test_scores_are_compared_by_divergences():
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, -1.0]])
    p, q = (functional.softmax(t / 2, -1) for t in (teacher, student))
    wanted = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(softmax_loss(student, teacher, 2.0), wanted)
    assert softmax_loss(student[:0], teacher[:0], 2.0) == 0
    target, score = torch.sigmoid(teacher), torch.sigmoid(student)
    cross = -(target * score.log() + (1 - target) * (1 - score).log())
    wanted = ((score - target) ** 2 * cross).sum() / target.sum()
    torch.testing.assert_close(dense_loss(student, teacher), wanted)


def test_coordinates_are_compared_as_their_own_loss_takes_them():
    """Ten times as sharp, in RTMPose."""
    config = f'{POSE}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py'
    model, teacher = bare(config), bare(config)
    taught = lesson(model, teacher, features=0.0)
    x = torch.randn(2, 17, 8), torch.randn(2, 17, 8)
    for run, scores in zip((taught.student, taught.taught), x, strict=True):
        run.outputs = {name: [scores] for name in taught.points.simcc}
    wanted = softmax_loss(10 * x[0], 10 * x[1], 2.0)
    found = taught.losses(model, torch.tensor(3.0))
    torch.testing.assert_close(found, {'loss_distill_simcc': 3 * wanted})


def test_queries_are_taught_by_features_alone():
    detr = bare('mmdet::detr/detr_r50_8xb2-150e_coco.py')
    assert points_of(detr) == Points('neck')


def test_a_model_without_features_can_not_be_taught():
    with pytest.raises(mmprune.PruneError, match='Linear has no neck or backbone'):
        points_of(torch.nn.Linear(2, 2))
