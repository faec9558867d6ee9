import pytest

from mmprune import PruneError
from mmprune.budget.schedule import target_at


def test_linear_and_cubic():
    assert [target_at(i, 4, 0.2) for i in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [target_at(i, 2, 0.5, 'cubic') for i in range(3)] == pytest.approx([1, 0.5625, 0.5])
    assert target_at(7, 7, 0.3, 'cubic') == 0.3
    assert target_at(1, 2, 1.0) == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((1, 4, 0.5, 'square'), "schedule='square'; there are linear, cubic"),
        ((5, 4, 0.5), r'step=5 is outside 0 ... steps=4'),
        ((-1, 4, 0.5), r'step=-1 is outside'),
        ((0, 0, 0.5), 'steps=0: give a whole number from 1 on'),
        ((1, True, 0.5), 'steps=True: give a whole number'),
        ((1, 4, 0.0), r'final=0.0 is outside \(0, 1\]'),
        ((1, 4, 1.5), r'final=1.5 is outside'),
    ],
)
def test_nonsense_is_named(arguments, message):
    with pytest.raises(PruneError, match=message):
        target_at(*arguments)
