"""docs/criteria.md: its table against the criteria that are registered."""

import re
from pathlib import Path

from mmprune.score import CRITERIA

PAGE = Path(__file__).parents[2] / 'docs' / 'criteria.md'


def test_every_criterion_is_described():
    table = PAGE.read_text().split('## Options')[0]
    assert set(re.findall(r'^\| `(\w+)`', table, re.MULTILINE)) == set(CRITERIA)
