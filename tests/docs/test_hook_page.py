"""docs/hook.md: its table against the signature of PruneHook and the fields of Budget."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from mmprune.budget.budget import Budget
from mmprune.budget.schedule import resolve
from mmprune.mm.hooks import PruneHook

PAGE = (Path(__file__).parents[2] / 'docs' / 'hook.md').read_text()


def rows(title):
    """Cells of the table under a heading."""
    part = PAGE.split(f'## {title}\n')[1].split('\n## ')[0]
    lines = [line for line in part.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def options():
    """{name: default} of the hook, then of the budget."""
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(PruneHook.__init__).parameters.items()
        if name not in ('self', 'options')
    }
    for field in fields(Budget):
        made = field.default_factory is not MISSING
        found[field.name] = field.default_factory() if made else field.default
    return found


def test_the_table_has_every_option_in_order_with_its_default():
    table = {name.strip('`'): default.strip('`') for name, default, _, _ in rows('Options')}
    assert table == {name: repr(default) for name, default in options().items()}
    assert list(table) == list(options())
    assert all(meaning for _, _, _, meaning in rows('Options'))


def test_the_docstring_has_every_option():
    documented = re.findall(
        r'^    (?: {4})(\w+): ', inspect.getdoc(PruneHook).replace('\n', '\n    '), re.M
    )
    signature = [name for name in inspect.signature(PruneHook.__init__).parameters if name != 'self']
    assert sorted(documented) == sorted(signature)


@pytest.mark.parametrize('given, told', rows('Times'))
def test_the_examples_of_times(given, told):
    asked = eval(f'dict({given.strip("`")})')
    hook = PruneHook(keep_flops=0.5, **asked)
    steps, interval, begin = map(int, re.findall(r'\d+', told))
    assert resolve(*hook.requested_times, 1800, 150) == (begin, interval, steps)
