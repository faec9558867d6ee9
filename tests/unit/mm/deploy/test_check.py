"""What rounding excuses: PyTorch has to show the same difference with other rounding."""

import numpy as np
import pytest
import torch

from mmprune.mm.deploy import check

SIDE = 100
A, B, C, D, E = (
    ([0, 0, 10, 10], 0.9, 1),
    ([20, 20, 40, 50], 0.5, 2),
    ([60, 60, 90, 90], 0.4, 2),
    ([22, 20, 42, 50], 0.5, 2),  # overlaps B
    ([30, 20, 50, 50], 0.5, 2),
)


def found(*detections):
    boxes, scores, labels = zip(*detections, strict=True)
    return {
        'boxes': np.array(boxes, np.float32),
        'scores': np.array(scores, np.float32),
        'labels': np.array(labels),
    }


def differs(file, *runs, want=(A, B, C)):
    return check.picture_differs(found(*want), found(*file), [found(*run) for run in runs], SIDE)


def test_a_tie_that_falls_the_other_way_is_excused():
    assert len(differs((A, D, C))) == 2
    assert not differs((A, D, C), (A, B, C), (A, D, C))
    assert not differs((A, C), (A, C))  # below a threshold
    assert not differs((A, B, C, D), (A, B, C, D))  # above one
    assert not differs((A, B, C), (A, D, C))


def test_what_no_run_shows_is_not_excused():
    runs = ((A, B, C), (A, D, C))
    assert 'class 2 at (30.000' in differs((A, E, C), *runs)[0]
    assert 'class 1 at (0.000' in differs((D, C), *runs)[0] and len(differs((D, C), *runs)) == 1
    assert 'is not in PyTorch' in differs((A, A, D, C), *runs)[0]  # the same one twice
    assert len(differs((A, D, D, C), *runs)) == 1


def test_where_most_detections_change_nothing_is_proven():
    assert 'rounding changes 2 of 3 detections' in differs((A, E, D), (A, E, D))[0]


def test_numbers_may_differ_by_a_multiple_of_what_rounding_does():
    moved = [([box[0] + 0.05, *box[1:]], score, label) for box, score, label in (A, B, C)]
    assert len(differs(moved)) == 6
    near = [([box[0] + 0.02, *box[1:]], score, label) for box, score, label in (A, B, C)]
    assert not differs(moved, near)
    far = [([box[0] + 3, *box[1:]], score, label) for box, score, label in (A, B, C)]
    assert 'rounding changes 3 of 3' in differs(far, far)[0]


def test_outputs_that_are_no_detections():
    want, out = [np.array([1.0, 2, 4, 3])], {'output_0': np.array([1.0, 2.001, 4, 3])}
    assert 'output_0 differs from PyTorch by 1.00e-03' in check.tensors_differ(want, out, [])
    unsteady = [np.array([1.0, 2.5, 4, 3])]
    assert not check.tensors_differ(want, out, [unsteady])
    assert not check.tensors_differ(want, out, [[np.array([1.0, 2.0005, 4, 3])]])
    wrong = {'output_0': np.array([1.1, 2.001, 4, 3])}
    assert 'by 1.00e-01' in check.tensors_differ(want, wrong, [unsteady])
    wrong = {'output_0': np.array([np.nan, 2.0, 4, 3])}
    assert 'by nan' in check.tensors_differ(want, wrong, [unsteady])
    assert 'more than half' in check.tensors_differ(want, out, [[np.array([2.0, 9, 9, 3])]])
    assert 'is (3,), and (4,) in PyTorch' in check.tensors_differ(want, {'x': np.ones(3)}, [])


def test_masks_differ_only_at_pixels_that_rounding_leaves_alone():
    want, box = np.zeros((1, 20, 20), bool), np.array([[0, 0, 20, 20]], np.float32)
    want[0, :, 10:] = True
    ours = {'masks': np.zeros((1, 20, 20), np.float32), 'boxes': box}
    ours['masks'][0, :, 9:] = 1  # a column more
    pairs = {0: (0, 0.0)}
    assert '20 of 200 pixels differ' in check.masks_differ(want, ours, pairs, [])[0]
    assert not check.masks_differ(want, ours, pairs, [(ours['masks'] > 0.5, pairs)])
    assert check.masks_differ(want, ours, pairs, [(ours['masks'] > 0.5, {})])


def test_copies_differ_by_about_what_rounding_does():
    network, images = torch.nn.Conv2d(3, 4, 3), torch.ones(1, 3, 5, 5)
    with torch.no_grad():
        copies = list(check.rounded_otherwise(network, images))
        wanted = network(images)
        moved = [float((other(changed) - wanted).abs().max()) for other, changed in copies]
    assert len(moved) == check.RUNS and len(set(moved)) > 1 and min(moved) > 0 and max(moved) < 1e-4
    assert [float(changed.std()) for _, changed in copies] == pytest.approx([1e-6] * 8, rel=0.5)
