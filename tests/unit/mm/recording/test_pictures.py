"""Detections noted as numbers, and drawn again from them."""

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmprune.mm.recording import pictures

BLACK = np.zeros((64, 96, 3), np.uint8)


def jpeg(folder, image=BLACK, name='a.png'):
    cv2.imwrite(str(folder / name), image)
    return str(folder / name)


def boxes(coordinates, scores, labels=None):
    count = len(scores)
    return DetDataSample(
        pred_instances=InstanceData(
            bboxes=torch.tensor(coordinates, dtype=torch.float32).reshape(count, 4),
            scores=torch.tensor(scores),
            labels=torch.tensor(labels or [0] * count),
        )
    )


def test_notes_boxes_above_the_threshold_as_plain_numbers():
    found = pictures.predictions_of(boxes([[1, 2, 3, 4.04], [5, 6, 7, 8]], [0.9, 0.1], [2, 0]))

    assert found == {'boxes': [[1, 2, 3, 4.0]], 'labels': [2], 'scores': [pytest.approx(0.9)]}
    assert type(found['labels'][0]) is int and type(found['boxes'][0][0]) is float


def test_persons_of_one_picture_come_together():
    one = {'keypoints': [[[1.0, 2.0]]], 'keypoint_scores': [[0.5]]}

    assert pictures.merged(None, one) == one
    assert pictures.merged(one, one)['keypoints'] == [[[1.0, 2.0]], [[1.0, 2.0]]]


def test_what_is_not_drawn_here_is_not_noted():
    assert pictures.predictions_of(DetDataSample()) is None
    assert pictures.predictions_of(1.0) is None
    flat = InstanceData(keypoints=np.zeros((1, 5, 3)), keypoint_scores=np.zeros((1, 5)))
    assert pictures.predictions_of(DetDataSample(pred_instances=flat)) is None


class Files:
    instances = None

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def get_data_info(self, index):
        told = {'img_path': self.names[index]}
        return told if self.instances is None else told | {'instances': self.instances}


def chosen(names, processes=1):
    return pictures.choose(Files(names), processes)['files']


def test_chooses_files_all_over_the_data_set():
    names = [f'{n}.png' for n in range(100)]

    assert chosen(names) == ['12.png', '37.png', '61.png', '86.png']
    # Of four processes the first one sees every fourth.
    assert chosen(names, 4) == ['12.png', '36.png', '60.png', '84.png']
    assert chosen(['a.png']) == ['a.png']
    assert chosen([]) == pictures.choose([1, 2, 3])['files'] == []


def test_notes_the_annotated_boxes_without_ignored_regions():
    files = Files(['a.png'])
    assert pictures.choose(files)['truth'] == {}  # a data set without annotations
    files.instances = [
        {'bbox': [1, 2, 3.04, 4], 'bbox_label': 2, 'ignore_flag': 0},
        {'bbox': [0, 0, 9, 9], 'bbox_label': 0, 'ignore_flag': 1},
    ]
    assert pictures.choose(files)['truth'] == {
        'a.png': {'boxes': [[1.0, 2.0, 3.0, 4.0]], 'labels': [2]}
    }


def test_notes_the_annotated_keypoints():
    points, visible = np.array([[[1.0, 2.0], [3.0, 4.0]]]), np.array([[1, 0]])
    people = InstanceData(keypoints=points, keypoints_visible=visible)
    found = pictures.annotated_keypoints(DetDataSample(gt_instances=people))
    assert found == {'keypoints': [[[1.0, 2.0], [3.0, 4.0]]], 'keypoint_scores': [[1, 0]]}
    assert pictures.annotated_keypoints(DetDataSample()) is None
    assert pictures.annotated_keypoints(1.0) is None


@pytest.mark.parametrize(('size', 'scale'), [((64, 96), 5.0), ((600, 500), 1.0), ((1280, 640), 0.5)])
def test_keeps_a_copy_at_the_size_of_pages(tmp_path, size, scale):
    content, factor = pictures.small_copy(jpeg(tmp_path, np.zeros((*size, 3), np.uint8)))

    shape = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).shape
    assert factor == scale and shape[:2] == (size[0] * scale, size[1] * scale)


def test_a_file_that_is_no_picture_or_not_there(tmp_path):
    (tmp_path / 'b.png').write_text('no picture')

    assert pictures.small_copy(str(tmp_path / 'b.png')) is None
    assert pictures.small_copy(str(tmp_path / 'c.png')) is None


def changed(content, picture):
    """Where two JPEGs differ clearly: (height, width) bool."""
    one, other = (
        cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR).astype(int)
        for each in (content, picture)
    )
    return (np.abs(one - other) > 60).any(-1)


def test_draws_boxes_where_they_are(tmp_path):
    picture, scale = pictures.small_copy(jpeg(tmp_path))
    found = {'boxes': [[60, 20, 90, 50]], 'labels': [0], 'scores': [0.9]}

    there = changed(pictures.drawn(picture, scale, found, {'classes': ['square']}), picture)

    rows, columns = (np.flatnonzero(there.any(axis)) for axis in (1, 0))
    assert columns.min() == pytest.approx(60 * scale, abs=6)
    assert columns.max() == pytest.approx(90 * scale, abs=6)
    assert rows.max() == pytest.approx(50 * scale, abs=6)


def test_draws_keypoints_where_they_are(tmp_path):
    picture, scale = pictures.small_copy(jpeg(tmp_path))
    found = {'keypoints': [[[30.0, 30.0], [80.0, 30.0]]], 'keypoint_scores': [[0.9, 0.1]]}
    meta = {'keypoint_colors': [[255, 255, 255]] * 2, 'skeleton_links': [], 'skeleton_link_colors': []}

    there = changed(pictures.drawn(picture, scale, found, meta), picture)

    rows, columns = np.nonzero(there)
    assert (columns.mean() / scale, rows.mean() / scale) == pytest.approx((30, 30), abs=1)


def test_draws_what_is_annotated_over_what_was_found(tmp_path):
    picture, scale = pictures.small_copy(jpeg(tmp_path))
    nothing = {'boxes': [], 'labels': [], 'scores': []}
    truth = {'boxes': [[60, 20, 90, 50]], 'labels': [0]}

    rows, columns = np.nonzero(changed(pictures.drawn(picture, scale, nothing, {}, truth), picture))

    assert (columns.min() / scale, columns.max() / scale) == pytest.approx((60, 90), abs=1)
    assert (rows.min() / scale, rows.max() / scale) == pytest.approx((20, 50), abs=1)


def test_draws_crosses_at_annotated_keypoints_that_are_visible(tmp_path):
    picture, scale = pictures.small_copy(jpeg(tmp_path))
    nothing = {'keypoints': [], 'keypoint_scores': []}
    truth = {'keypoints': [[[30.0, 30.0], [80.0, 30.0]]], 'keypoint_scores': [[1, 0]]}

    rows, columns = np.nonzero(changed(pictures.drawn(picture, scale, nothing, {}, truth), picture))

    assert (columns.mean() / scale, rows.mean() / scale) == pytest.approx((30, 30), abs=1)


def test_draws_nothing_where_nothing_was_found(tmp_path):
    picture, scale = pictures.small_copy(jpeg(tmp_path))
    found = pictures.predictions_of(boxes([], []))

    assert not changed(pictures.drawn(picture, scale, found, {}), picture).any()


def test_a_data_sets_meta_as_plain_data():
    meta = {'classes': ('a', 'b'), 'keypoint_colors': np.array([[1, 2, 3]]), 'sigmas': np.ones(3)}

    assert pictures.drawing_meta(meta) == {'classes': ['a', 'b'], 'keypoint_colors': [[1, 2, 3]]}
    assert pictures.drawing_meta(None) == {}
