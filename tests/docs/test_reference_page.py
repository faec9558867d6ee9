"""The reference page has the names in ``__all__``, and the code on pages imports no others."""

import re

import pytest

import mmprune
import mmprune.mm
from tests.helpers import pages
from tests.helpers.pages import ROOT, blocks

PUBLIC = {f'mmprune.{name}' for name in set(mmprune.__all__) - {'__version__'}} | {
    f'mmprune.mm.{name}' for name in set(mmprune.mm.__all__) - {'load_pruned'}
}
"""``load_pruned`` is in both packages, and the page has it once."""


def test_the_reference_has_the_public_names_and_no_others():
    page = (ROOT / 'docs' / 'reference.md').read_text()
    directives = re.findall(r'^\.\. auto(?!module)\w+:: ([\w.]+)$', page, re.MULTILINE)
    assert sorted(directives) == sorted(PUBLIC)


def test_every_public_name_can_be_imported():
    for name in PUBLIC:
        package, _, attribute = name.rpartition('.')
        assert getattr(mmprune.mm if package == 'mmprune.mm' else mmprune, attribute) is not None


@pytest.mark.parametrize('page', pages.PAGES, ids=lambda page: page.name)
def test_code_on_pages_imports_public_names_alone(page):
    if page.name == 'CHANGELOG.md':
        return
    for block in blocks(page):
        for package, names in re.findall(
            r'^from (mmprune[\w.]*) import (.+)$', block.text, re.MULTILINE
        ):
            for name in names.split(', '):
                assert f'{package}.{name}' in PUBLIC, f'{block}: {package}.{name} is not public'
