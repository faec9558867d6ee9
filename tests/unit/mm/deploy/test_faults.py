"""Planted faults of decoding: none of them may pass as rounding."""

import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch

from mmprune import PruneError
from mmprune.mm.deploy import candidates, check, one_stage, patches, two_stage
from mmprune.mm.deploy.export import network_of
from tests.helpers.deploy_models import META
from tests.helpers.lively import enliven
from tests.unit.mm.deploy.test_families import (
    BEST,
    BOXES,
    FAMILIES,
    FIXED,
    NECK,
    ONE_STAGE,
    POOL,
    RPN,
    SMALL,
)
from tools.zoo import build, load

FASTER = dict(
    backbone=SMALL, neck=NECK, rpn_head=RPN, test_cfg=BEST,
    roi_head=dict(bbox_roi_extractor=POOL, bbox_head=BOXES),
)  # fmt: skip
MODELS = FAMILIES | {
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco.py', ONE_STAGE),
    'faster_rcnn': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', FASTER),
}


def replaced(name, make, *modules):
    """A function that stands under ``name`` in modules, with ``make(the right one)`` in its place."""

    def plant(stack):
        for module in modules:
            wrong = make(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, wrong))

    return plant


def priors_off(right):
    def wrong(head, levels, **options):
        first, *others = right(head, levels, **options)
        return [first * 1.05, *others]

    return wrong


def with_labels(change):
    def make(right):
        def wrong(head, level):
            scores, labels, rows = right(head, level)
            return scores, *change(labels, rows, head.cls_out_channels)

        return wrong

    return make


def without(attribute, value):
    """A pooling layer with another number."""

    def make(right):
        def wrong(layer, features, rois):
            layer = copy.copy(layer)
            setattr(layer, attribute, value(getattr(layer, attribute)))
            return right(layer, features, rois)

        return wrong

    return make


def next_level(right):
    def wrong(extractor, features, rois, roi_scale_factor=None):
        extractor = copy.copy(extractor)
        extractor.finest_scale //= 4
        return right(extractor, features, rois, roi_scale_factor)

    return wrong


def other_nms(make):
    return lambda right: lambda found, nms, k: right(found, make(nms), k)


BOTH = (one_stage, two_stage)
FAULTS = {
    'a level has the wrong stride': replaced('priors_of', priors_off, *BOTH),
    'no clip': replaced('clipped', lambda _: lambda boxes, size: boxes, *BOTH),
    'columns swapped': replaced('decoded', lambda r: lambda *a: r(*a)[..., [1, 0, 3, 2]], one_stage),
    'offsets a tenth too small': replaced(
        'decoded', lambda r: lambda c, p, offsets, s: r(c, p, 0.9 * offsets, s), *BOTH
    ),
    'no score factor': replaced('scaled', lambda _: lambda scores, factors, rows: scores, one_stage),
    'sigmoid twice': replaced('sigmoid', lambda right: lambda x: right(right(x)), one_stage),
    'the next class': replaced(
        'best_of_level', with_labels(lambda labels, rows, n: ((labels + 1) % n, rows)), one_stage
    ),
    'the next row': replaced(
        'best_of_level',
        with_labels(lambda labels, rows, n: (labels, (rows + 1).clamp(max=0))),
        one_stage,
    ),
    'another overlap': replaced(
        'suppressed', other_nms(lambda nms: candidates.NMS(0.9 * nms.iou_threshold)), *BOTH
    ),
    'classes suppress each other': replaced(
        'suppressed', other_nms(lambda nms: candidates.NMS(nms.iou_threshold, True)), *BOTH
    ),
    'RoIs on the next level': replaced('from_levels', next_level, patches),
    'RoIs half a pixel off': replaced('pooled', without('aligned', lambda is_so: not is_so), patches),
}  # fmt: skip
CASES = {
    'retinanet': [
        'a level has the wrong stride', 'no clip', 'sigmoid twice', 'the next class',
        'classes suppress each other',
    ],
    'atss': ['no score factor', 'the next row', 'another overlap'],
    'gfl': ['a level has the wrong stride', 'offsets a tenth too small'],
    'ssd': ['columns swapped'],
    'faster_rcnn_c4': ['RoIs half a pixel off'],
    'faster_rcnn': ['RoIs on the next level', 'offsets a tenth too small'],
}  # fmt: skip


def size_of(family):
    return FIXED.get(family, (96, 128))


def made(family):
    name, changes = MODELS[family]
    config = load(f'mmdet::{name}')
    config.merge_from_dict(dict(model=copy.deepcopy(changes)), allow_list_keys=True)
    model, _ = build(config, size=300 if family == 'ssd' else 128)
    model.cfg, model.dataset_meta = config, META['detection']
    return enliven(model.eval(), size_of(family))


def outputs_of(network, images):
    """What a file of the network would give."""
    return dict(zip(network.output_names, (x.numpy() for x in network(images)), strict=True))


@torch.no_grad()
@pytest.mark.parametrize('family', CASES)
def test_no_fault_passes(family):
    model = made(family)
    network = network_of(model)
    images, samples = check.prepared(model, check.pictures_for(size_of(family), 32, 2)[0])
    right = outputs_of(network, images)
    check.check_outputs(right, network, images, samples, 'here')
    passed = []
    for name in CASES[family]:
        with contextlib.ExitStack() as stack:
            FAULTS[name](stack)
            wrong = outputs_of(network, images)
        assert not np.allclose(wrong['dets'], right['dets'], 1e-3) or not np.array_equal(
            wrong['labels'], right['labels']
        ), f'{name}: changes nothing'
        with contextlib.suppress(PruneError):
            check.check_outputs(wrong, network, images, samples, 'here')
            passed.append(name)
    assert not passed
