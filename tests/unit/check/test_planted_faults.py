"""Faults that are planted into exact cuts: whatever changes the result, the check has to find."""

import json
from pathlib import Path

import pytest

from tests.helpers.planted_faults import plant_faults

FIGURES = Path(__file__).parents[3] / 'docs' / 'figures.json'


@pytest.mark.slow
def test_every_fault_that_matters_is_found():
    found = plant_faults()
    assert not found['missed']
    assert found['planted'] > 90 and found['matter'] > 60
    told = json.loads(FIGURES.read_text())['planted_faults']['values']
    assert (found['planted'], found['matter']) == (told['planted'], told['matter'])
