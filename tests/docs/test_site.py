"""The pages as a site: it builds without a warning, has all that is public, and fetches nothing."""

import re
import subprocess
import sys

import pytest

import mmprune
from tests.helpers.browser import browsing
from tests.helpers.pages import ROOT

pytest.importorskip('sphinx', reason='the site needs the extra docs: make install has it')
pytest.importorskip('myst_parser')
pytest.importorskip('furo')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-d', folder / 'doctrees']
    done = subprocess.run(
        [*command, '-b', 'html', 'docs', folder / 'html'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / 'html'


def test_every_page_is_there(site):
    pages = {
        page.relative_to(ROOT / 'docs').with_suffix('.html') for page in (ROOT / 'docs').rglob('*.md')
    }
    assert pages <= {page.relative_to(site) for page in site.rglob('*.html')}


def test_every_public_name_is_explained(site):
    text = (site / 'reference.html').read_text()
    for name in set(mmprune.__all__) - {'__version__'}:
        assert f'id="mmprune.{name}"' in text, f'docs/reference.md has no {name}'


def test_nothing_is_fetched_from_elsewhere(site):
    elsewhere = r'(?:https?:)?//'
    fetched = re.compile(
        rf"""<(?!a\b)[a-z]+\b[^>]*\b(?:src|href|srcset|data|action)=["']?{elsewhere}"""
        rf"""|url\(\s*["']?{elsewhere}|@import\s+["']?{elsewhere}"""
        rf"""|(?:fetch|import|importScripts|open)\(\s*["'`](?:GET["'], *["'])?{elsewhere}""",
        re.IGNORECASE,
    )
    files = [file for file in site.rglob('*') if file.suffix in ('.html', '.css', '.js')]
    assert len(files) > 20
    found = {file.name: match[0][:120] for file in files if (match := fetched.search(file.read_text()))}
    assert not found


def test_no_page_overflows_or_leaves_itself(site, tmp_path):
    told = []
    with browsing(tmp_path / 'profile') as context:
        page = context.new_page()
        page.on('console', lambda message: told.append(message.text))
        page.on('request', lambda request: told.append(request.url))
        for width in (390, 1280):
            page.set_viewport_size({'width': width, 'height': 900})
            for file in sorted(site.glob('*.html')):
                page.goto(file.as_uri())
                wide = page.evaluate('document.documentElement.scrollWidth')
                assert wide <= width, f'{file.name} is {wide} wide at {width}'
    assert [text for text in told if not text.startswith(('file:', 'data:'))] == []
