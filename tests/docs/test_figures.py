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


JOB = FIGURES['main_job']['values']
AP, FIRST = JOB['pruned']['AP'], JOB['unpruned']['AP']
LEFT, AFTER = JOB['params']['left'], JOB['params']['after']
FAULTS = FIGURES['planted_faults']['values']


@pytest.mark.parametrize(
    ('page', 'right', 'wrong', 'told'),
    [
        ('README.md', f'AP {AP:.3f}', 'AP 0.111', 'README.md says: with FPN'),
        ('docs/results.md', f'{AFTER:,} │ {LEFT:.1f}% │', '1,345 │ 34.6% │', 'says: │ parameters'),
        (
            'docs/results.md',
            f'{FIRST:.3f} │       {AP:.3f} │',
            f'{FIRST:.3f} │       0.111 │',
            'lacks: │ coco/bbox_mAP',
        ),
        ('docs/results.md', f'| {LEFT:.1f} % | {AP:.3f} |', '| 11.1 % | 0.111 |', 'says: | pruned |'),
        (
            'docs/cuts.md',
            f'into {FAULTS["planted"]} exact',
            'into 7 exact',
            'says: plants faults into 7',
        ),
    ],
)
def test_another_number_is_seen(page, right, wrong, told):
    assert PAGES[page].count(right) == 1
    pages = PAGES | {page: PAGES[page].replace(right, wrong)}
    assert any(told in line for line in contradictions(FIGURES, pages))


def test_the_same_words_with_another_number_are_seen_on_any_page():
    page = 'docs/glossary.md'
    text = PAGES['docs/cuts.md'].replace(f'the {FAULTS["matter"]} that', 'the 7 that')
    (line,) = contradictions(FIGURES, PAGES | {page: text})
    assert line.startswith(f'{page} says: the 7 that')


def test_pages_that_have_figures_are_there():
    assert set(LINES) <= set(PAGES)
