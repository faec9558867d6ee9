"""What the docstrings of the public names show runs, and each of them says what it takes and gives."""

import doctest
import inspect
import re

import pytest
import torch

import mmprune
from mmprune.score import CRITERIA

ELSEWHERE = {
    'Outcome', 'Units', 'adapter', 'choose', 'load_pruned', 'make_plan', 'rule', 'scores_now',
    'sensitivity',
}  # fmt: skip
"""The docstring of the package, docs/ and the README have examples of these."""

PUBLIC = {
    name: thing
    for name in mmprune.__all__
    if inspect.isfunction(thing := getattr(mmprune, name)) or inspect.isclass(thing)
}

RESULTS = {
    'Analysis', 'Call', 'ChannelGraph', 'Floor', 'Group', 'GroupCost', 'GroupSensitivity', 'LayerCost',
    'LockPrice', 'Locked', 'Sensitivity', 'WeightAxis',
}  # fmt: skip
"""Classes that users get and do not make."""

CALLED = sorted(set(PUBLIC) - RESULTS - {'PruneError'})


def run(objects):
    """Examples in the docstrings of these {name: object}, and of their methods; how many ran."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(verbose=False)
    told = []
    for name, thing in objects.items():
        for test in finder.find(thing, name, globs={'mmprune': mmprune}):
            torch.manual_seed(0)
            runner.run(test, out=told.append)
    assert not runner.failures, ''.join(told)
    return runner.tries


@pytest.fixture(autouse=True)
def own_criteria():
    """What an example registers is not for other tests."""
    before = set(CRITERIA)
    yield
    for name in set(CRITERIA) - before:
        del CRITERIA[name]


def test_the_five_steps_of_the_package():
    steps = doctest.DocTestParser().get_examples(mmprune.__doc__)
    assert len(steps) > 15
    whole = doctest.DocTestParser().get_doctest(mmprune.__doc__, {}, 'mmprune', None, 0)
    told, runner = [], doctest.DocTestRunner(verbose=False)
    runner.run(whole, out=told.append)
    assert not runner.failures, ''.join(told)


@pytest.mark.parametrize('name', sorted(set(CALLED) - ELSEWHERE))
def test_an_example_runs(name):
    assert run({name: PUBLIC[name]}) > 0, f'{name} has no example'


SHORT = {'rule', 'scores_now', 'sensitivity'}
"""What they return is in their first sentence."""

EXPLAINED = [PUBLIC[name] for name in CALLED if name not in SHORT]


@pytest.mark.parametrize('thing', [*EXPLAINED, mmprune.Pruner.rebuild_model])
def test_what_goes_in_and_comes_out_is_said(thing):
    complain_of_gaps(thing)


def complain_of_gaps(thing):
    """Each parameter stands in ``Args:``, what a function returns in ``Returns:``."""
    text, signature = inspect.getdoc(thing), inspect.signature(thing)
    sections = re.split(r'^(Args|Attributes|Returns|Raises|Example):$', text, flags=re.MULTILINE)
    parts = dict(zip(sections[1::2], sections[2::2], strict=True))
    entries = re.findall(r'^    (\w[\w, ]*):', parts.get('Args', ''), flags=re.MULTILINE)
    said = {name.strip() for entry in entries for name in entry.split(',')}
    missing = [name for name in signature.parameters if name not in said | {'self'}]
    assert not missing, f'Args: lacks {missing}'
    unknown = said - set(signature.parameters)
    assert not unknown, f'Args: has {unknown}, which are not taken'
    if not inspect.isclass(thing) and signature.return_annotation not in (None, 'None'):
        assert 'Returns' in parts
    return parts
