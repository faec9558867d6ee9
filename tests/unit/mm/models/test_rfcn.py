"""R-FCN's pooling against its definition, and its head's training."""

from pathlib import Path

import pytest
import torch
from mmcv.ops import RoIAlign

import mmprune
from mmprune.mm.models.rfcn import cells, fold
from tools import zoo

CONFIGS = Path(__file__).parents[4] / 'configs'
ROIS = torch.tensor([[0, 3.0, 5.0, 40.0, 29.0], [1, -6.0, 10.0, 20.0, 60.0], [1, 7.0, 7.0, 7.5, 9.0]])


@pytest.mark.parametrize('grid', [1, 3, 7])
def test_each_cell_is_pooled_from_its_own_maps(grid):
    channels = 5
    maps = torch.randn(2, grid * grid * channels, 16, 16)
    one = RoIAlign(1, spatial_scale=0.25, sampling_ratio=2)
    pooled = one(fold(maps, grid), cells(ROIS, grid)).view(len(ROIS), grid, grid, channels)
    # RoIAlign of every map over the whole RoI, of which each cell picks its own.
    whole = RoIAlign(grid, spatial_scale=0.25, sampling_ratio=2)(maps, ROIS)
    for row in range(grid):
        for column in range(grid):
            first = (row * grid + column) * channels
            wanted = whole[:, first : first + channels, row, column]
            torch.testing.assert_close(pooled[:, row, column], wanted, rtol=1e-4, atol=1e-5)


def test_scores_see_where_in_the_roi_things_are():
    """Maps of the upper left cell alone: a RoI whose upper left cell covers the spot scores."""
    maps = torch.zeros(1, 9, 16, 16)
    maps[:, 0, 2:5, 2:5] = 1
    rois = torch.tensor([[0, 2.0, 2.0, 14.0, 14.0], [0, -6.0, -6.0, 6.0, 6.0]])
    votes = RoIAlign(1, sampling_ratio=2)(fold(maps, 3), cells(rois, 3)).view(2, 9).mean(1)
    assert votes[0] > 0
    assert votes[1] == 0


def test_the_head_learns_and_detects():
    model, loss = zoo.build(str(CONFIGS / '_base_' / 'rfcn_shapes.py'))
    assert type(model).__name__ == 'RFCN'
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    first = None
    for _ in range(12):
        losses = loss(model)
        total = losses['loss_cls'] + losses['loss_bbox']
        first = first or total.item()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.item() < 0.7 * first

    _, predict = zoo.build(str(CONFIGS / '_base_' / 'rfcn_shapes.py'), mode='predict')
    model.eval()
    with torch.no_grad():
        found = predict(model)[0].pred_instances
    assert found.bboxes.shape[1] == 4
    assert len(found.scores) == len(found.labels) == len(found.bboxes)


def test_a_wrong_number_of_maps_is_an_error():
    config = zoo.load(str(CONFIGS / '_base_' / 'rfcn_shapes.py'))
    config.model.roi_head.bbox_roi_extractor.out_channels = 64
    with pytest.raises(mmprune.PruneError, match='out_channels=64: R-FCN pools 11 maps'):
        zoo.build(config)
