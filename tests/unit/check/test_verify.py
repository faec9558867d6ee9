import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mmprune
from mmprune import PruneError
from tests.helpers.by_hand import copied, error, masked_by_hand, outputs
from tests.helpers.versions import needs_torch

X = torch.randn(2, 3, 6, 6)


def net(act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), act(), nn.Conv2d(8, 4, 1))


def forward(model):
    return model(X)


def cut(model, **options):
    pruned = copied(model)
    return pruned, mmprune.prune(pruned, forward, keep_channels=0.5, check=False, **options)


def test_an_exact_cut_passes():
    model = net()
    pruned, plan = cut(model)
    assert mmprune.verify(model, pruned, plan, forward) < 1e-5


@pytest.mark.parametrize('name', ['0.weight', '0.bias', '2.weight', '2.bias'])
def test_one_wrong_number_does_not_pass(name):
    model = net()
    pruned, plan = cut(model)
    with torch.no_grad():
        pruned.get_parameter(name).view(-1)[0] += 0.5
    with pytest.raises(PruneError, match='is not the masked original: relative error'):
        mmprune.verify(model, pruned, plan, forward)


def test_a_forward_that_runs_another_model_is_refused():
    model = net()
    pruned, plan = cut(model)
    with pytest.raises(PruneError, match='does not run the model that it is given'):
        mmprune.verify(model, pruned, plan, lambda m: model(X))


def test_a_result_without_a_finite_number_is_refused():
    model = net()
    pruned, plan = cut(model)
    nan = torch.full_like(X, float('nan'))
    with pytest.raises(PruneError, match='nothing can be compared'):
        mmprune.verify(model, pruned, plan, lambda m: m(nan))


def test_a_decision_on_other_numbers_is_seen():
    """The decision itself is repeated, and nothing else comes out."""
    model = net()
    pruned, plan = cut(model)
    with torch.no_grad():
        pruned[2].weight.mul_(1.5)
    with pytest.raises(PruneError, match='is not the masked original'):
        mmprune.verify(model, pruned, plan, lambda m: m(X).sum(1) > 0)


def test_a_weight_divided_by_its_norm():
    model = net()
    parametrizations.weight_norm(model[0])
    pruned, plan = cut(model)
    assert mmprune.verify(model, pruned, plan, forward) < 1e-5


HALF = pytest.param(torch.float16, marks=needs_torch('2.2', 'convolutions of float16 on the CPU'))


@pytest.mark.parametrize('dtype', [torch.bfloat16, HALF, torch.float64])
def test_other_precisions(dtype):
    model = net().to(dtype)
    mmprune.prune(model, lambda m: m(X.to(dtype)), keep_channels=0.5)
    assert model[0].weight.shape[0] == 4


def test_autocast():
    model = net()

    def run(m):
        with torch.autocast('cpu', torch.bfloat16):
            return m(X)

    mmprune.prune(model, run, keep_channels=0.5)
    assert model[0].weight.shape[0] == 4


def test_rounding_is_told_from_a_fault_in_double_precision():
    """Also where the code names a precision."""

    class Ill(nn.Module):
        """Its error is some units in the last place, more of them the wider it is."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)

        def forward(self, x):
            features = self.a(x)
            y = self.b(features).float()
            return y * (1 + 100 * features.stride(0) * torch.finfo(y.dtype).eps)

    model = Ill()
    pruned, plan = cut(model)
    with pytest.raises(PruneError, match='relative error'):
        mmprune.verify(model, pruned, plan, forward, tolerance=1e-4)
    assert mmprune.verify(model, pruned, plan, forward) < 1e-6
    with torch.no_grad():
        pruned.b.weight[0, 0] += 0.1
    with pytest.raises(PruneError, match='is not the masked original: relative error'):
        mmprune.verify(model, pruned, plan, forward)


def test_boxes_that_rounding_moved_give_the_same_features():
    """A map that changes from pixel to pixel, sampled at boxes far from its corner."""

    pytest.importorskip('mmcv')
    from mmcv.ops import roi_align

    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3)
            self.map = torch.randn(1, 2, 64, 2048, generator=torch.Generator().manual_seed(0))

        def forward(self, x):
            y = 200 * self.b(self.a(x)).mean((2, 3))
            y = 20 * y.sin()
            corners = [900 + y[:, 0], 20 + y[:, 1], 1400 + y[:, 2], 60 + y[:, 3]]
            boxes = torch.stack([y[:, 0] * 0, *corners], 1)
            return roi_align(self.map * 100, boxes, (7, 7))

    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    run = lambda m: m(x)  # noqa: E731
    model = Boxes()
    pruned = copied(model)
    plan = mmprune.prune(pruned, run, keep_channels=0.5, check=False)
    assert mmprune.verify(model, pruned, plan, run, tolerance=1e-5) < 1e-5
    # With the boxes of each model's own they are not the same, and nothing is wrong.
    assert error(outputs(masked_by_hand(model, plan.keep), run), outputs(pruned, run)) > 1e-5
    with torch.no_grad():
        pruned.b.bias[3] += 0.01
    with pytest.raises(PruneError, match='first in a comparison or a choice'):
        mmprune.verify(model, pruned, plan, run)


def test_decisions_are_repeated_behind_layers_that_turn_out_narrower():
    """Their outputs are not waited for any more, and the first run has to be ahead all the same."""

    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.act, self.b = nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 3)

        def forward(self, x):
            first = self.b(self.act(self.a(x)))
            y = self.act(self.act(self.act(self.a(x))))
            close = y.sum(1) >= y.double().sum(1).float()  # rounding alone decides
            return first, self.b(self.act(self.a(x))), close.nonzero().float()

    model = Deciding()
    pruned, plan = cut(model)
    big = torch.randn(2, 3, 110, 110)  # 6 MiB a map, so the first run stops at the third
    run = lambda m: m(big)  # noqa: E731
    wanted, found = outputs(masked_by_hand(model, plan.keep), run), outputs(pruned, run)
    assert wanted[2].shape != found[2].shape
    assert mmprune.verify(model, pruned, plan, run, tolerance=1e-5) < 1e-5


def test_what_a_compiled_function_decides_counts_once():
    """A copy that the check makes of it is none of the model's copies, which go by their number."""

    pytest.importorskip('mmcv')
    from mmcv.ops import nms

    class Suppressing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 5, 3)

        def forward(self, x):
            rows = self.b(self.a(x)).permute(0, 2, 3, 1).reshape(-1, 5)
            corners = rows[:, :2] * 20
            boxes = torch.cat([corners, corners + 10 + rows[:, 2:4].abs()], 1)
            _, kept = nms(boxes.contiguous(), rows[:, 4].contiguous(), 0.5)
            # A copy of the model's own, as large as the one that the check makes of ``kept``.
            return rows[kept], rows[(kept * 0).clone()]

    model = Suppressing()
    pruned, plan = cut(model)
    assert mmprune.verify(model, pruned, plan, lambda m: m(X), tolerance=1e-4) < 1e-4
