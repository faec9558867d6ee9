"""Numbers as pages show them."""

import pytest

from mmprune.mm.pages import numbers


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (350455552, '350.5 M'), (999, '999'), (1000, '1 k'), (1321520, '1.322 M'), (99999, '100 k'),
        (0, '0'), (None, ''), (2.5e12, '2.5 T'), (12.3456, '12.35'), (999999, '1 M'),
    ],
)  # fmt: skip
def test_short(value, text):
    assert numbers.short(value) == text


def test_nothing_is_shown_where_there_is_no_number():
    assert numbers.integer(None) == numbers.percent(None) == numbers.percent(1, 0) == ''
    assert numbers.score(float('nan')) == numbers.score(-1) == numbers.score(None) == ''
    assert numbers.change(0.5, -1) == ''


def test_fractions_scores_and_changes():
    assert numbers.percent(1, 3) == '33.3%'
    assert numbers.score(0.49949) == '0.499'
    assert numbers.change(0.5, 0.25) == '-0.250'
    assert numbers.change(0.25, 0.5) == '+0.250'
    assert numbers.integer(350455552) == '350,455,552'
