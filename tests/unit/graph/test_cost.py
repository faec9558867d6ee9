"""FLOPs and parameters against torch's and mmengine's counters, and before against after a cut."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmprune
from mmprune import compat
from mmprune.graph import cost
from tests.helpers.versions import needs_torch


def counted_by_torch(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2  # it counts two for a multiply-add


MODELS = [
    'alexnet', 'vgg11_bn', 'resnet18', 'resnext50_32x4d', 'mobilenet_v2', 'densenet121',
    'squeezenet1_0', 'inception_v3', 'shufflenet_v2_x1_0', 'convnext_tiny', 'swin_t',
]  # fmt: skip


@pytest.mark.parametrize('name', MODELS)
def test_flops_are_half_of_torchs_and_stay_so_after_a_cut(name):
    torchvision = pytest.importorskip('torchvision')

    options = dict(init_weights=False) if name == 'inception_v3' else {}
    model = getattr(torchvision.models, name)(num_classes=10, weights=None, **options).eval()
    x = torch.randn(1, 3, 96, 96)
    traced = mmprune.trace(model, lambda m: m(x))
    assert traced.flops == counted_by_torch(model, x)
    assert traced.params == sum(p.numel() for p in model.parameters())

    plan = mmprune.prune(model, lambda m: m(x), keep_channels=0.7, check=False)
    assert plan.history[-1]['flops'] == counted_by_torch(model, x) < traced.flops
    assert plan.history[-1]['params'] == sum(p.numel() for p in model.parameters()) < traced.params


@needs_torch('2.2', 'an operation for attention on the CPU that its counter leaves out')
def test_attention_counts_which_torch_leaves_out_on_a_cpu():
    torchvision = pytest.importorskip('torchvision')

    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    with compat.plain_attention():  # otherwise it is one operation that no counter looks into
        theirs = counted_by_torch(model, x)
    tokens, layers = 5, 2
    query_key_and_value = layers * 2 * tokens * tokens * 64
    assert mmprune.trace(model, lambda m: m(x)).flops == theirs + query_key_and_value


class Inference(nn.Module):
    """A detector's layers, its post-processing aside."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, x):
        features = self.detector.extract_feat(x)
        if not hasattr(self.detector, 'roi_head'):
            return self.detector.bbox_head(features)
        rois = self.detector.roi_head.bbox_head(features[0][..., :7, :7])
        return self.detector.rpn_head(features), rois


@pytest.mark.parametrize(
    'config',
    [
        'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
        'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    ],
)
def test_detectors_agree_with_mmengine_but_for_norms_and_upsampling(config):
    """It counts one for an element of an upsampled map and one or two for one of a norm."""
    pytest.importorskip('mmengine')
    from mmengine.analysis import FlopAnalyzer, get_model_complexity_info

    pytest.importorskip('mmdet')
    from tools.zoo import build

    model = Inference(build(config, size=128)[0].eval())
    x = torch.randn(1, 3, 128, 128)
    traced = mmprune.trace(model, lambda m: m(x))
    theirs = FlopAnalyzer(model, (x,)).by_operator()
    others = sum(theirs.pop(name, 0) for name in ('batch_norm', 'group_norm', 'upsample_nearest2d'))
    assert set(theirs) <= {'conv', 'linear', 'addmm'} and 0 < others < 0.01 * traced.flops
    assert traced.flops == sum(theirs.values())
    info = get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)
    assert traced.params == info['params'] and traced.flops + others == info['flops']


class Shared(nn.Module):
    """Two parts; the head runs on two sizes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.body(x)
        return [self.last(self.head(level)) for level in (x, x[..., ::2, ::2])]


X = torch.randn(1, 3, 8, 8)


def test_a_layer_that_runs_twice_counts_twice_and_its_parameters_once():
    traced = mmprune.trace(Shared(), lambda m: m(X))
    assert traced.flops == 64 * 8 * 27 + (64 + 16) * (8 * 6 + 6 * 2)
    assert traced.params == 8 * 27 + 8 + 8 * 6 + 6 + 6 * 2 + 2


def test_parts_add_up():
    traced = mmprune.trace(Shared(), lambda m: m(X))
    everything = np.ones(traced.n_units, dtype=bool)
    assert cost.parts_of(traced) == ['body', 'head', 'last']
    for terms in (cost.flops, cost.params, cost.channels):
        parts = [terms(traced, part)(everything) for part in cost.parts_of(traced)]
        assert sum(parts) == terms(traced)(everything) and all(parts)


def test_work_is_multiply_adds_and_32_of_them_for_each_element_that_is_written():
    """What is written is most of a depthwise layer's work, and little of a dense one's."""
    depthwise, dense = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 64, 3, padding=1, groups=groups))
        for groups in (8, 1)
    )
    shares = []
    for model in (depthwise, dense):
        traced = mmprune.trace(model, lambda m: m(torch.randn(2, 3, 8, 8)))
        keep = np.ones(traced.n_units, dtype=bool)
        written = 32.0 * 2 * 64 * (8 + 64)  # images, positions, channels
        assert cost.memory(traced)(keep) * 32 == written
        work = cost.work(traced)(keep)
        assert work == cost.flops(traced)(keep) + written
        shares.append(written / work)
    assert shares[0] > 0.7 and shares[1] < 0.4
    assert cost.BY_NAME['work'] is cost.work


def test_what_a_unit_accounts_for_is_the_first_derivative():
    traced = mmprune.trace(Shared(), lambda m: m(X))
    everything = np.ones(traced.n_units, dtype=bool)
    for terms in (cost.flops(traced), cost.params(traced), cost.memory(traced)):
        slopes = terms.unit_gradient(everything)
        for unit in (0, traced.n_units - 1):
            less = everything.copy()
            less[unit] = False
            assert terms(everything) - terms(less) == pytest.approx(slopes[unit])


@pytest.mark.parametrize(
    'name, part, inside',
    [
        ('backbone.layer1.0.conv1.weight', 'backbone', True),
        ('backbone.layer1.0.conv1.weight', 'backbone.layer1', True),
        ('backbone.layer10.0.conv1.weight', 'backbone.layer1', False),
        ('backbone.layer1.0.conv1.weight', '*.conv1.*', True),
        ('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head', True),
        ('roi_head.mask_head.conv', 'roi_head', True),
        ('roi_head.mask_head.conv', 'roi_head.bbox_head', False),
        ('', '', True),
        ('neck', 'backbone', False),
    ],
)
def test_in_part(name, part, inside):
    assert cost.in_part(name, part) is inside
