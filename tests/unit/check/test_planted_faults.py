"""Faults that are planted into exact cuts: whatever changes the result, the check has to find."""

import pytest

from tests.helpers.planted_faults import plant_faults


@pytest.mark.slow
def test_every_fault_that_matters_is_found():
    found = plant_faults()
    assert not found['missed']
    assert found['planted'] > 90 and found['matter'] > 60
