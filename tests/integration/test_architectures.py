"""Every architecture of the list: traced, cut, rebuilt and trained on, from its own config."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.structures import BaseDataElement
from torch import nn

import mmprune
from mmprune import Plan
from mmprune.check.verify import compare, compare_in_double
from mmprune.contexts import evaluating
from mmprune.graph import cost
from mmprune.mm.model_modes import first_samples
from mmprune.nested import tensors_in
from tests.helpers.forwards import forwards_of
from tools import zoo

CONFIGS = Path(__file__).parents[2] / 'configs'
TWO_STAGE = ('backbone', 'rpn_head', 'roi_head.bbox_head')

# Config, and the parts that must lose channels: all that have any besides outputs.
LIST = {
    'classification/alexnet_prune.py': ('net',),
    'classification/vgg16_prune.py': ('net',),
    'classification/vgg16_bn_prune.py': ('net',),
    'classification/inception_v3_prune.py': ('net',),
    'classification/resnet18_prune.py': ('net',),
    'classification/resnet50_prune.py': ('net',),
    'classification/resnet_v2_prune.py': ('net',),
    'classification/densenet121_prune.py': ('net',),
    'classification/squeezenet_prune.py': ('net',),
    'classification/mobilenet_v2_prune.py': ('net',),
    'faster_rcnn_prune.py': ('neck', *TWO_STAGE),
    'faster_rcnn/faster-rcnn_r50_fpn_prune_coco.py': ('neck', *TWO_STAGE),
    'detection/faster-rcnn_r50-caffe_c4_prune_coco.py': (
        'backbone', 'rpn_head', 'roi_head.shared_head',
    ),
    'detection/faster-rcnn_r50-caffe-dc5_prune_coco.py': TWO_STAGE,
    'detection/rfcn_prune.py': ('neck', *TWO_STAGE),
    'detection/rfcn_r50_prune_coco.py': TWO_STAGE,
    'detection/rfcn_r50_fpn_prune_coco.py': ('neck', *TWO_STAGE),
    'detection/retinanet_prune.py': ('backbone', 'neck', 'bbox_head'),
    'detection/retinanet_r50_fpn_prune_coco.py': ('backbone', 'neck', 'bbox_head'),
    'keypoint/hourglass_prune.py': ('backbone',),
    'keypoint/hourglass52_prune_coco.py': ('backbone',),
    'keypoint/fpn_prune.py': ('backbone', 'neck'),
    'keypoint/simple_baseline_prune.py': ('backbone', 'head'),
    'keypoint/simple_baseline_r50_prune_coco.py': ('backbone', 'head'),
    'keypoint/hrnet-w32_prune_coco.py': ('backbone',),
    'keypoint/rtmpose-s_prune_coco.py': ('backbone', 'head'),
}  # fmt: skip


def build(config, size=96):
    """(model in training mode, batch of its data loader) with weights at which errors show."""
    config = zoo.load(str(CONFIGS / config))
    model = zoo.build_model(config)
    scope = config.default_scope
    if scope == 'mmdet':
        batch = zoo.detection_batch(config, size)
    elif scope == 'mmpose':
        batch = first_samples(zoo.pose_batch(config), 1)
    else:
        batch = classification_batch(config)
    zoo.shake(model, forwards_of(model, batch)[1][0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it draws as many numbers as there are channels
    return model, batch


def classification_batch(config):
    size = config.train_dataloader.dataset.pipeline[0]['size']
    samples = []
    for label in (1, 4):
        sample = BaseDataElement()
        sample.set_field(label, 'gt_label')
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        samples.append(dict(inputs=image, data_samples=sample))
    return pseudo_collate(samples)


def train_step(model, batch, optimizer):
    """mmengine's own, without its wrapper; the loss as a number."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    optimizer.zero_grad()
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize('config', LIST)
def test_it_prunes_exactly_and_comes_back(config):
    model, batch = build(config)
    fresh = copy.deepcopy(model)
    tensor, also = forwards_of(model, batch)
    both = lambda m: [run(m) for run in (tensor, *also)]  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_step(model, batch, optimizer)
    original = copy.deepcopy(model)

    assert mmprune.trace(model, also[-1]).unknown_ops == {}
    plan = mmprune.prune(model, both, keep_channels=0.7, optimizer=optimizer, check=False)

    whole, kept = channels(original), channels(model)
    for part in LIST[config]:
        assert kept[part] < whole[part], part
    assert parameters(model) < 0.7 * parameters(original)
    if compare(original, model, plan, both, 1e-5)[1]:  # of rounding, or of a fault?
        assert compare_in_double(original, model, plan, both)[0] < 1e-9

    meta = json.loads(json.dumps(plan.to_meta()), object_hook=whole_numbers)
    Plan.from_meta(meta).apply(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    for wanted, found in zip(outputs(model, both), outputs(fresh, both), strict=True):
        assert torch.equal(wanted, found)

    for parameter, state in optimizer.state.items():
        assert state['momentum_buffer'].shape == parameter.shape
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert math.isfinite(train_step(model, batch, optimizer))
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.5 * sum(p.requires_grad for p in model.parameters())


def channels(model):
    """Output channels of the layers of each part."""
    found = {}
    for name, module in model.named_modules():
        width = getattr(module, 'out_channels', getattr(module, 'out_features', None))
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            part = cost.part_of(name)
            found[part] = found.get(part, 0) + width
    return found


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def outputs(model, forward):
    """All float results of a run in evaluation mode at fixed random state."""
    with evaluating(model), torch.no_grad():
        torch.manual_seed(0)
        np.random.seed(0)
        return [t for t in tensors_in(forward(model)) if t.is_floating_point()]


def whole_numbers(found):
    """JSON's keys are strings; a plan's dimensions are numbers."""
    return {int(k) if k.isdigit() else k: v for k, v in found.items()}
