"""Faster R-CNN with FPN, R18 and R50: exact, rebuilt, and trained on as if nothing had been there."""

import copy

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector

import mmprune
from mmprune import Plan
from mmprune.check.verify import verify
from mmprune.mm.hooks import PruneHook
from tests.helpers.by_hand import assert_exact, narrowed
from tests.helpers.equality import assert_same
from tools import zoo

BOXES = torch.tensor(
    [[0, 4.0, 6.0, 60.0, 50.0], [0, 10.0, 2.0, 90.0, 94.0], [1, 30.0, 30.0, 80.0, 44.0]]
)
"""Fixed proposals: (image, x1, y1, x2, y2)."""


def r18():
    cfg = zoo.load('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone.depth = 18
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    return cfg


CONFIGS = {
    'r18': r18,
    'r50': lambda: zoo.load('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
}


@pytest.fixture(scope='module', params=CONFIGS)
def cut_model(request):
    """(config, unpruned model, pruned model, plan, loss forward): 30 % of every group gone."""
    config = CONFIGS[request.param]()
    original, forward = zoo.build(config)
    pruned = copy.deepcopy(original)
    plan = mmprune.prune(pruned, forward, keep_channels=0.7, divisor=1, check=False)
    return config, original, pruned, plan, forward


def outputs(model):
    """RPN outputs of all levels, and RoI outputs at fixed proposals."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    model.eval()
    with torch.no_grad():
        features = model.extract_feat(x)
        rpn = model.rpn_head(features)
        roi = model.roi_head._bbox_forward(features, BOXES)
    return [*rpn[0], *rpn[1], roi['cls_score'], roi['bbox_pred']]


def test_masked_is_cut(cut_model):
    _, original, pruned, plan, forward = cut_model
    assert all(each.abs().max() > 1e-3 for each in outputs(pruned))  # nothing hides behind zeros
    assert_exact(original, pruned, plan, outputs, 1e-5)
    assert verify(original, pruned, plan, forward, tolerance=1e-5) < 1e-5


def test_every_part_is_narrower(cut_model):
    _, original, pruned, plan, _ = cut_model
    for name in (
        'backbone.conv1.weight',
        'backbone.layer4.1.conv2.weight',
        'neck.lateral_convs.0.conv.weight',
        'neck.fpn_convs.3.conv.weight',
        'rpn_head.rpn_conv.weight',
        'roi_head.bbox_head.shared_fcs.0.weight',
        'roi_head.bbox_head.shared_fcs.1.weight',
    ):
        before, after = original.get_parameter(name).shape, pruned.get_parameter(name).shape
        assert after[0] <= 0.71 * before[0] + 1, name
    # 256 channels of 7 x 7 positions, flattened: whole channels go.
    first = plan.keep['roi_head.bbox_head.shared_fcs.0.weight'][1]
    channels = plan.keep['neck.fpn_convs.0.conv.weight'][0]
    assert first == [49 * c + position for c in channels for position in range(49)]
    assert pruned.roi_head.bbox_roi_extractor.out_channels == len(channels)


def test_rebuilt_from_the_unpruned_config_it_is_the_same(cut_model):
    config, original, pruned, plan, forward = cut_model
    again = copy.deepcopy(pruned)
    second = mmprune.prune(again, forward, keep_flops=0.4, check=False)
    for model, made in ((pruned, plan), (again, second)):
        fresh = zoo.bare(config)
        Plan.from_meta(made.to_meta()).apply(fresh)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert_same(outputs(model), outputs(fresh))
    assert len(second.history) == 2
    assert second.history[1]['flops'] <= 0.4 * second.history[0]['flops_before']
    assert_exact(original, again, second, outputs, 1e-5)


@pytest.mark.parametrize(
    ('kind', 'options', 'keys'),
    [
        (torch.optim.SGD, dict(lr=1e-3, momentum=0.9), ['momentum_buffer']),
        (torch.optim.AdamW, dict(lr=1e-4), ['exp_avg', 'exp_avg_sq']),
    ],
)
def test_momentum_is_what_it_was_at_the_kept_indices(kind, options, keys):
    model, forward = zoo.build(r18())
    optimizer = kind(model.parameters(), **options)
    loss, _ = model.parse_losses(forward(model))
    loss.backward()
    optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    before = {
        (names[id(p)], key): state[key].clone() for p, state in optimizer.state.items() for key in keys
    }
    plan = mmprune.prune(model, forward, keep_channels=0.7, divisor=1, optimizer=optimizer, check=False)
    narrower = 0
    for parameter, state in optimizer.state.items():
        for key in keys:
            dims = plan.keep.get(names[id(parameter)], {})
            narrower += len(dims)
            assert state[key].shape == parameter.shape
            assert_same(narrowed(before[names[id(parameter)], key], dims), state[key])
    assert narrower > 50
    loss, _ = model.parse_losses(forward(model))
    loss.backward()
    optimizer.step()


def test_mmdet_defaults_freeze_the_stem_and_it_stays():
    """frozen_stages=1, norm_eval=True: what frozen weights read is left, the rest is pruned."""
    config = r18()
    config.model.backbone.frozen_stages = 1
    config.model.backbone.norm_eval = True
    model, forward = zoo.build(config)
    model.train()
    loss, _ = model.parse_losses(forward(model))
    loss.backward()
    plan = mmprune.prune(model, forward, keep_flops=0.7, divisor=1, score='taylor', check=False)
    assert 'backbone.conv1.weight' not in plan.keep
    assert 'backbone.layer1.0.conv1.weight' not in plan.keep
    assert 'backbone.layer3.0.conv1.weight' in plan.keep


def test_the_coco_config_builds_and_is_pruned_by_its_hook():
    config = zoo.load('configs/faster_rcnn/faster-rcnn_r50_fpn_prune_coco.py')
    hook = next(hook for hook in config.custom_hooks if hook['type'] == 'PruneHook')
    budget = PruneHook(**{k: v for k, v in hook.items() if k != 'type'}).budget
    model, forward = zoo.build(config)
    plan = mmprune.prune(
        model, forward, check=False, **{k: v for k, v in budget.to_meta().items() if v}
    )
    assert plan.history[-1]['flops'] <= 0.5 * plan.history[-1]['flops_before']
    for name in ('backbone.layer4.0.conv1', 'neck.fpn_convs.0.conv', 'rpn_head.rpn_conv'):
        assert model.get_submodule(name).out_channels % 8 == 0


def test_inference_detector_takes_a_pruned_model(tmp_path, cut_model):
    config, _, pruned, plan, _ = cut_model
    path = tmp_path / 'pruned.pth'
    meta = {'mmprune': plan.to_meta(), 'dataset_meta': {'classes': ('a', 'b')}}
    torch.save({'meta': meta, 'state_dict': pruned.state_dict()}, path)
    model = mmprune.load_pruned(config, path)
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    model.cfg.test_dataloader.dataset.pipeline[1].scale = (128, 96)
    result = inference_detector(model, picture)
    assert result.pred_instances.bboxes.shape[1] == 4
