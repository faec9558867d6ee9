import pytest

from mmprune import PruneError
from mmprune.budget.schedule import check_times, resolve, target_at


def test_targets_fall_linearly():
    assert [target_at(i, 4, 0.2) for i in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert target_at(7, 7, 0.3) == 0.3
    assert target_at(1, 2, 1.0) == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((5, 4, 0.5), r'step=5 is outside 0 ... steps=4'),
        ((-1, 4, 0.5), r'step=-1 is outside'),
        ((0, 0, 0.5), 'steps=0: must be an integer >= 1'),
        ((1, True, 0.5), 'steps=True: must be an integer >= 1'),
        ((1, 4, 0.0), r'final=0.0 is outside \(0, 1\]'),
        ((1, 4, 1.5), r'final=1.5 is outside'),
    ],
)
def test_nonsense_is_named(arguments, message):
    with pytest.raises(PruneError, match=message):
        target_at(*arguments)


# -- when -----------------------------------------------------------------------------------------


def times(begin=None, end=None, interval=None, steps=None, by_epoch=False, length=150, multiple=1):
    """Of a training of 1,800 iterations, in twelve epochs."""
    return tuple(resolve(begin, end, interval, steps, by_epoch, 1800, length, multiple))


@pytest.mark.parametrize(
    'options, found',
    [
        # Iterations, as they are.
        (dict(interval=100), (0, 100, 10)),
        (dict(begin=900, interval=37, steps=8), (900, 37, 8)),
        (dict(begin=1, interval=1, steps=1), (1, 1, 1)),
        (dict(begin=100, end=400, steps=7), (100, 42, 7)),
        (dict(begin=100, end=400, interval=70), (100, 70, 4)),
        (dict(begin=100, end=400, interval=1000), (100, 1000, 1)),
        (dict(end=5000, steps=10), (0, 500, 10)),  # the caller sees that it is behind the training
        # Fractions of the training.
        (dict(begin=0.5, end=2 / 3, steps=8), (900, 37, 8)),
        (dict(begin=0.0, end=0.2, steps=30), (0, 12, 30)),
        (dict(end=1.0, steps=2), (0, 900, 2)),
        (dict(begin=0.25, interval=0.01), (450, 18, 10)),
        (dict(interval=0.0001), (0, 1, 10)),
        (dict(begin=900, end=0.75, steps=3), (900, 150, 3)),  # either, side by side
        # Epochs.
        (dict(begin=1, end=3, steps=4, by_epoch=True), (150, 75, 4)),
        (dict(begin=2, interval=1, steps=3, by_epoch=True), (300, 150, 3)),
        (dict(begin=0.5, end=8, steps=3, by_epoch=True), (900, 100, 3)),
        # What is left out.
        (dict(), (0, 12, 30)),
        (dict(steps=5), (0, 72, 5)),
        (dict(begin=0.5), (900, 12, 30)),
        (dict(begin=0.96), (1728, 3, 24)),  # to the end of the training, three iterations for each cut
        (dict(begin=0.9, steps=30), (1620, 6, 30)),
        (dict(begin=100, end=104), (100, 4, 1)),
        # No more cuts than there are iterations.
        (dict(begin=100, end=104, steps=30), (100, 1, 4)),
        (dict(begin=1.0), (1800, 1, 1)),
    ],
)
def test_options_in_iterations(options, found):
    assert times(**options) == found
    if options.keys() >= {'end'} and options.get('interval') != 1000:
        begin, interval, steps = found
        end = options['end']
        unit = 1800 if isinstance(end, float) else 150 if options.get('by_epoch') else 1
        assert begin + interval * steps <= end * unit + 1e-6


@pytest.mark.parametrize(
    'options, found',
    [
        (dict(begin=0.25, interval=0.01), (452, 20, 10)),
        (dict(begin=1, interval=1, by_epoch=True), (152, 152, 10)),
        (dict(begin=0.5, end=2 / 3, steps=8), (900, 36, 8)),
        (dict(end=10, steps=30), (0, 4, 2)),
        (dict(end=3), (0, 4, 1)),
        (dict(interval=0.0001), (0, 4, 10)),
        (dict(), (0, 12, 30)),  # three steps of the optimizer for each cut
        (dict(begin=5, interval=7), (5, 7, 10)),  # explicit iterations stay
    ],
)
def test_cuts_fall_behind_whole_steps_of_accumulated_gradients(options, found):
    assert times(**options, multiple=4) == found


def test_scores_that_need_no_iterations_leave_thirty_cuts():
    found = resolve(None, None, None, None, False, 300, 150, scored=1)
    assert tuple(found) == (0, 2, 30)


@pytest.mark.parametrize(
    'options, found',
    [
        (dict(), (600, 8, 30)),  # in a fifth of what is left
        (dict(begin=100, steps=4), (600, 60, 4)),
        (dict(begin=900, steps=4), (900, 60, 4)),
        (dict(begin=0.0, end=0.5, steps=3), (600, 100, 3)),
        (dict(interval=50, steps=2), (600, 50, 2)),
    ],
)
def test_a_training_that_is_resumed_is_not_cut_in_the_past(options, found):
    known = dict(begin=None, end=None, interval=None, steps=None) | options
    assert tuple(resolve(*known.values(), False, 1800, 150, done=600)) == found
    with pytest.raises(PruneError, match='end=0.25 is iteration 450 .*resumed at iteration 600'):
        resolve(None, 0.25, None, None, False, 1800, 150, done=600)


def test_the_shortest_training_has_one_cut():
    assert tuple(resolve(None, None, None, None, False, 1, 1)) == (0, 1, 1)


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(begin=True),
            r'begin=True: must be an integer >= 0 \(iterations\), or a float in \[0, 1\]',
        ),
        (dict(begin=-1), r'begin=-1: must be an integer >= 0'),
        (dict(begin=1.5), r'begin=1.5: must be .* a float in \[0, 1\] \(a fraction of the training\)'),
        (dict(begin=float('nan')), 'begin=nan: must be'),
        (dict(begin='0.5'), "begin='0.5': must be"),
        (dict(end=0), r'end=0: must be an integer >= 1 \(iterations\), or a float in \(0, 1\]'),
        (dict(end=0.0), 'end=0.0: must be'),
        (dict(end=True), 'end=True: must be'),
        (dict(interval=0), 'interval=0: must be an integer >= 1'),
        (dict(interval=-0.1), 'interval=-0.1: must be'),
        (dict(interval=0, by_epoch=True), r'interval=0: must be an integer >= 1 \(epochs\)'),
        (dict(steps=0), 'steps=0: must be an integer >= 1'),
        (dict(steps=2.0), 'steps=2.0: must be an integer >= 1'),
        (dict(steps=True), 'steps=True: must be'),
        (dict(by_epoch=1), 'by_epoch=1: must be True or False'),
        (dict(end=9, interval=2, steps=3), 'end=9, interval=2 and steps=3 contradict .* to None'),
        (dict(begin=0.5, end=0.5), 'end=0.5: must come after begin=0.5'),
        (dict(begin=9, end=8), 'end=8: must come after begin=9'),
    ],
)
def test_options_that_no_training_could_take_are_named(options, message):
    known = dict(begin=None, end=None, interval=None, steps=None) | options
    with pytest.raises(PruneError, match=message):
        check_times(**known)


def test_an_end_before_the_beginning_is_told_in_iterations():
    with pytest.raises(
        PruneError, match='end=0.25 is iteration 450 and begin=900 iteration 900 of 1800'
    ):
        times(begin=900, end=0.25)


def test_epochs_where_there_are_none():
    with pytest.raises(PruneError, match='begin=2 with by_epoch=True: this training has no epochs'):
        times(begin=2, by_epoch=True, length=None)
    assert times(begin=0.5, interval=0.1, by_epoch=True, length=None) == (900, 180, 10)
