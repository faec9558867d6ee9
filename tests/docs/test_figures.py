"""Figures on README and docs/ are those in docs/figures.json, which benchmarks/figures.py collects."""

import json

import pytest

from benchmarks.figures import FILE, LINES, SOURCES, contradictions, pages_of

FIGURES, PAGES = json.loads(FILE.read_text()), pages_of()


def test_no_page_says_anything_else():
    assert not contradictions(FIGURES, PAGES)


def test_every_source_is_there_and_its_command_on_a_page():
    assert {name: each['command'] for name, each in FIGURES.items()} == {
        name: source.command for name, source in SOURCES.items()
    }
    for source in SOURCES.values():
        assert any(source.command in text for text in PAGES.values()), source.command


@pytest.mark.parametrize(
    ('page', 'right', 'wrong', 'told'),
    [
        ('README.md', 'AP 0.498', 'AP 0.512', 'README.md says: with FPN'),
        ('docs/results.md', '1,146,106 │ 29.5% │', '1,345,678 │ 34.6% │', 'says: │ parameters'),
        ('docs/results.md', '0.421 │       0.498 │', '0.421 │       0.512 │', 'lacks: │ coco/bbox_mAP'),
        (
            'docs/results.md',
            '| 29.5 % | 0.498 |',
            '| 32.8 % | 0.494 |',
            'says: | pruned | 49.9 % | 32.8',
        ),
        ('docs/cuts.md', 'into 146 exact', 'into 147 exact', 'says: plants faults into 147'),
    ],
)
def test_another_number_is_seen(page, right, wrong, told):
    assert PAGES[page].count(right) == 1
    pages = PAGES | {page: PAGES[page].replace(right, wrong)}
    assert any(told in line for line in contradictions(FIGURES, pages))


def test_the_same_words_with_another_number_are_seen_on_any_page():
    page = 'docs/glossary.md'
    text = PAGES['docs/cuts.md'].replace('the 88 that', 'the 89 that')
    (line,) = contradictions(FIGURES, PAGES | {page: text})
    assert line.startswith(f'{page} says: the 89 that')


def test_pages_that_have_figures_are_there():
    assert set(LINES) <= set(PAGES)
