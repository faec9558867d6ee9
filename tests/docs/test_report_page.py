"""The page about the page: its code runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / 'docs' / 'report.md'


def test_the_code_makes_a_page(tmp_path, monkeypatch):
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)

    exec(code, {})

    text = (tmp_path / 'page.html').read_text()
    assert '<h1>My page</h1>' in text and '<title>conv1: 64 to 40</title>' in text


def test_the_picture_is_small():
    assert PAGE.with_suffix('.webp').stat().st_size < 200_000
