"""Pages from plain sections: whole, escaped, and complete in themselves."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mmprune.mm import pages
from mmprune.mm.pages import charts
from mmprune.mm.pages.terminal import ROWS, print_page

EVIL = '<script>alert("x")</script>'


def everything(word: str = 'word') -> pages.Page:
    """One of each block, with ``word`` wherever text goes."""
    bars = charts.paired_bars([charts.Bar(word, 8, 4), charts.Bar('b', 4, 4)])
    lines = [charts.Line(word, [(0, 1), (1, 2)], marks=True)]
    table = pages.Table(
        word,
        [word, 'n'],
        [[word, pages.Cell(word, share=0.5, share_before=1.0, mark='fell', code=True)]],
        ['n'],
    )
    blocks = [
        pages.Text(word),
        pages.Notice(word, 'warning'),
        pages.Facts([(word, word, word)]),
        pages.Figure(word, bars, word, [(word, 'was')], table),
        pages.Figure(word, charts.curves(lines, word, word, moments=[0.5]), key=charts.key(lines)),
        pages.Pictures(
            [(word, [pages.Picture(word, 'data:image/gif;base64,R0lGODlhAQABAAAAACw=', word)])]
        ),
        pages.Code(word, word),
        pages.Fold(word, [pages.Text(word)]),
    ]
    sections = [pages.Section(name, word, blocks if name == 'a' else []) for name in 'abc']
    return pages.Page(word, word, sections, word, [pages.Text(word)])


class Opened(HTMLParser):
    """Elements that are open; complains of one that is closed out of turn."""

    EMPTY = {'meta', 'link', 'img', 'br'}

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == 'script'
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_every_element_is_closed_where_it_was_opened():
    assert Opened(pages.render(everything())).open == []


def test_texts_are_escaped_everywhere():
    text = pages.render(everything(EVIL))

    assert Opened(text).scripts == 0
    assert '&lt;script&gt;' in text


def test_what_stands_between_backticks_is_code():
    assert '<code>a &lt; b</code> is' in pages.render(pages.Page('t', '`a < b` is', []))


def test_no_address_leads_out_of_the_page():
    text = pages.render(everything())

    found = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s>]+)', text)
    assert found and all(address.startswith(('#', 'data:')) for address in found), found
    assert "default-src 'none'" in text


def test_writes_the_file_whole(tmp_path):
    path = pages.write(everything(), tmp_path / 'new' / 'page.html')

    assert path.read_text() == pages.render(everything())
    assert [each.name for each in path.parent.iterdir()] == ['page.html']


def test_columns_of_numbers_stand_at_the_right_and_rows_have_heads():
    text = pages.render(everything())

    assert '<th scope="col" class="number">n</th>' in text
    assert re.search(r'<th scope="row"[^>]*>word</th>', text)


@pytest.mark.parametrize('numbers', [[], [(0, float('nan'))], [(3, 3.0)], [(0, 1), (0, 1)], [(1, -5)]])
def test_curves_are_drawn_of_whatever_numbers_there_are(numbers):
    lines = [charts.Line('loss', numbers, marks=True)]

    text = charts.curves(lines, 'x', 'y')(300)

    assert text.startswith('<svg') and 'nan' not in text


def test_no_bars_and_bars_of_nothing():
    assert '<svg' in charts.paired_bars([])(300)
    assert '<svg' in charts.paired_bars([charts.Bar('a', 0, 0)])(300)


def test_bars_are_as_long_as_what_they_stand_for():
    text = charts.paired_bars([charts.Bar('a', 100, 25), charts.Bar('b', 50, 50)], height=118)(300)

    heights = re.findall(r'height="([\d.]+)" class="(was|now)"', text)
    assert [(float(h), c) for h, c in heights] == [(100, 'was'), (25, 'now'), (50, 'was'), (50, 'now')]
    assert '<title>a: 100 to 25</title>' in text


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(0.37, 0.52, 4) == pytest.approx([0.4, 0.45, 0.5])
    assert charts.ticks(2, 2) == [2]


def printed(page):
    console = Console(file=io.StringIO(), width=140)
    print_page(page, console)
    return console.file.getvalue()


def test_a_terminal_shows_texts_and_tables_as_they_are():
    word = '[bold]word[/]'
    page = everything(word)
    table = pages.Table(word, [word, 'n'], [[pages.Cell(word), '1']], ['n'])

    text = printed(pages.Page(word, word, [*page.sections, pages.Section('t', 't', [table])]))

    assert f'Warning: {word}' in text
    assert f'┃ {word} ┃' in text and f'│ {word} │' in text


def test_a_terminal_says_how_many_rows_it_leaves_out():
    rows = [[f'row {number}', str(number)] for number in range(ROWS + 3)]
    section = pages.Section('a', 'A', [pages.Table('Rows', ['row', 'n'], rows, ['n'])])

    text = printed(pages.Page('title', 'lead', [section]))

    assert f'row {ROWS - 1} ' in text and f'row {ROWS} ' not in text
    assert '3 more rows are in the files' in text
