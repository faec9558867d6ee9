"""What rounding explains: near ties may fall either way, all else may not."""

import pytest
import torch

from mmprune import PruneError
from mmprune.mm.deploy import decisions
from mmprune.mm.deploy.candidates import best
from mmprune.mm.deploy.decisions import TOLERANCE, allowed, recorded, replayed, settled

OFF = TOLERANCE


def explains(kind, theirs, ours, *about):
    return decisions.MARGINS[kind](torch.as_tensor(theirs), torch.as_tensor(ours), OFF, *about)


def test_the_best_may_swap_where_they_are_near():
    scores = torch.tensor([[0.5, 0.50002, 0.9, 0.1]])
    assert not explains('the best', [[2, 0, 1]], [[2, 1, 0]], scores)
    assert 'a score of 0.1 stands where the best left is 0.5' in explains(
        'the best', [[2, 1, 3]], [[2, 1, 0]], scores
    )
    assert 'more than once' in explains('the best', [[2, 1, 1]], [[2, 1, 0]], scores)


def test_thresholds_and_classes():
    scores = torch.tensor([0.05000001, 0.2])
    assert not explains('a threshold', [False, True], [True, True], scores, 0.05, None)
    assert 'the other side of 0.05' in explains(
        'a threshold', [True, False], [True, True], scores, 0.05, None
    )
    # Pixels are measured by the picture.
    sides = torch.tensor([0.005])
    assert not explains('a threshold', [False], [True], sides, 0.0, (100, 80))
    assert explains('a threshold', [False], [True], sides, 0.0, (10, 8))
    both = torch.tensor([[0.4, 0.40001, 0.1]])
    assert not explains('the largest', [0], [1], both)
    assert 'taken for the largest' in explains('the largest', [2], [1], both)


def test_rois_and_their_levels():
    rois = torch.tensor([[0.0, 1, 2, 30, 40]])
    assert not explains('RoIs', rois + 0.005, rois, (64, 64))
    assert 'RoIs part by up to 2.00e-02 pixels' in explains('RoIs', rois + 0.02, rois, (64, 64))
    assert not explains('levels of RoIs', [0, 2], [1, 2], torch.tensor([2.00001, 4.5]))
    assert 'scale 4.5 is on another level' in explains(
        'levels of RoIs', [1, 1], [1, 2], torch.tensor([2.00001, 4.5])
    )


def test_what_nms_keeps():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5.0001], [20, 20, 30, 30], [0, 0, 10, 9]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])

    def says(rows, scores=scores):
        return explains('NMS', [rows], [[0, 1, 2]], boxes, scores, 0.5, -0.5, (64, 64))

    # The second overlaps the first by 0.50001, which may be above a half, or not.
    assert not says([0, 1, 2]) and not says([0, 2, -1])
    assert 'row 2 with score 0.7 is left out, and nothing kept overlaps it' in says([0, 1, -1])
    assert 'rows 0 and 3 are both kept' in says([0, 2, 3])
    assert 'do not descend' in says([2, 0, 1])
    assert 'gaps' in says([0, -1, 2]) and 'no candidates' in says([0, 0, 2])
    # Of two that overlap and are equally good either may stay; of others not.
    near = torch.tensor([[0.9, 0.8, 0.7, 0.89999]])
    assert not explains('NMS', [[3, 2]], [[0, 2]], boxes, near, 0.5, -0.5, (64, 64))
    assert 'row 0' in says([2, 3, -1])


def test_decisions_are_recorded_and_taken_in_their_order():
    scores = torch.tensor([[0.3, 0.30001, 0.2]])

    def run():
        best = settled('the best', scores.topk(2).indices, scores)
        return settled('a threshold', scores.gather(1, best) > 0.25, scores.gather(1, best), 0.25, None)

    with recorded() as own:
        run()
    assert [tuple(outcome.shape) for outcome in own] == [(1, 2), (1, 2)]
    with replayed(own) as exact:
        run()
    swapped = [own[0].flip(1), own[1]]
    with replayed(swapped) as exact:
        run()
    with replayed(swapped, exact):
        run()
    wrong = [own[0], ~own[1]]
    with pytest.raises(PruneError, match=r'decision 2 of 2 \(a threshold\): 0.3.* other side of 0.25'):  # noqa: SIM117
        with replayed(wrong, exact):
            run()
    with pytest.raises(PruneError, match=r'decision 2 of 1 .* is None in the file, and \(1, 2\)'):  # noqa: SIM117
        with replayed(own[:1]):
            run()
    assert settled('the best', own[0], scores) is own[0]  # nothing holds any more


def test_a_file_of_open_size_fills_up_its_rows():
    scores = torch.tensor([[0.3, 0.30001, 0.2]])
    filled = torch.tensor([[0, 1, 2, 4, 3]])  # of three scores the best five, as such a file has them
    with replayed([filled]) as exact:
        best(scores, 5)
    with replayed([filled], exact):
        values, places = best(scores, 5)
    assert places.tolist() == [[0, 1, 2, 0, 0]] and values[0, 3] < 0
    assert best(scores, 5)[0].shape == (1, 3)
    with replayed([filled.flip(1)], exact), pytest.raises(PruneError, match='a score of -1 stands'):
        best(scores, 5)


def test_how_much_is_allowed():
    assert allowed(0.0) == TOLERANCE and allowed(1e-4) == pytest.approx(4e-4) and allowed(1) == 1e-2
