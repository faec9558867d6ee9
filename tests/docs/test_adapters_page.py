"""The code on docs/adapters.md runs, block after block."""

import re
from pathlib import Path

from mmprune.graph.registry import BY_NAME, MODULES, RULES

PAGE = Path(__file__).parents[2] / 'docs' / 'adapters.md'


def test_every_block_runs_in_order():
    text = PAGE.read_text()
    tables = [(table, set(table)) for table in (MODULES, BY_NAME, RULES)]
    scope = {'__name__': 'adapters_page'}
    blocks = list(re.finditer(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == 9
    try:
        for block in blocks:
            line = text[: block.start(1)].count('\n')
            exec(compile('\n' * line + block[1], str(PAGE), 'exec'), scope)
    finally:  # what the page registers is not for other tests
        for table, before in tables:
            for key in set(table) - before:
                del table[key]
