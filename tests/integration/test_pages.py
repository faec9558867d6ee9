"""Pages in a browser: nothing leaves them, nothing overflows, they can be read by everybody."""

import pytest

from mmprune.mm.recording.run_page import write_page
from tests.helpers import records
from tests.helpers.browser import browsing


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp('profile')) as context:
        yield context


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    """{name: file}: of a run, and of one without a cut."""
    folder = tmp_path_factory.mktemp('runs')
    runs = [records.write(folder / name) for name in ('one', 'uncut')]
    records.change(runs[1], finished=False, history=[], scores=None, jumps=[], flops=None, params=None)
    return {run.name: write_page(run) for run in runs}


class Watched:
    """A page, and what it asked for and complained of."""

    def __init__(self, context, file, width=1280, scheme='light'):
        self.asked, self.said = [], []
        self.page = context.new_page()
        self.page.set_viewport_size({'width': width, 'height': 900})
        self.page.emulate_media(color_scheme=scheme)
        self.page.on('request', lambda request: self.asked.append(request.url))
        self.page.on('console', lambda message: self.said.append(message.text))
        self.page.on('pageerror', lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.page.close()


OVERFLOWING = """() => {
  const wide = document.documentElement.clientWidth, found = [];
  for (const each of document.querySelectorAll('body *')) {
    if (each.closest('.scroll, pre, .skip, svg')) continue;
    const box = each.getBoundingClientRect();
    if (box.width && (box.right > wide + 1 || box.left < -1)) found.push(each.outerHTML.slice(0, 90));
  }
  if (document.documentElement.scrollWidth > wide) found.push('the page itself');
  for (const each of document.querySelectorAll('.drawing svg')) {
    const frame = each.getBoundingClientRect();
    if (!frame.width) continue;
    for (const text of each.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      if (box.right > wide || box.left < 0) found.push('text ' + text.textContent);
    }
  }
  return found;
}"""


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('name', ['one', 'uncut'])
def test_is_whole_in_itself_and_nothing_overflows(browser, pages, name, width):
    with Watched(browser, pages[name], width) as watched:
        for details in watched.page.query_selector_all('details'):
            details.evaluate('each => each.open = true')

        assert watched.page.evaluate(OVERFLOWING) == []
        assert [url for url in watched.asked if not url.startswith('data:')] == [watched.file.as_uri()]
        assert watched.said == []
        assert watched.page.evaluate('performance.getEntriesByType("resource").length') == 0


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['one', 'uncut'])
def test_axe_finds_nothing(browser, pages, name, scheme):
    """Contrast, names, headings, tables, landmarks: axe-core's rules, all of them."""
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    with Watched(browser, pages[name], 390, scheme) as watched:
        for details in watched.page.query_selector_all('details'):
            details.evaluate('each => each.open = true')

        found = axe.run(watched.page)

    told = [
        f'{each["id"]}: {node["target"]}: {node["failureSummary"]}'
        for each in found.response['violations']
        for node in each['nodes'][:2]
    ]
    assert told == []


@pytest.mark.parametrize('width', [1280, 390])
def test_every_section_has_its_drawings_and_pictures(browser, pages, width):
    with Watched(browser, pages['one'], width) as watched:
        page = watched.page
        links = page.eval_on_selector_all('nav a', 'all => all.map(each => each.hash)')
        for address in links:
            assert page.eval_on_selector(address, 'each => each.getBoundingClientRect().height') > 80
        names = ['result', 'times', 'widths', 'history', 'scores', 'classes', 'pictures', 'locked']
        names.append('config')
        assert links == [f'#{name}' for name in names]
        page.eval_on_selector('#scores details', 'each => each.open = true')
        for name, count in (('widths', 2), ('history', 4), ('scores', 1)):
            shown = page.eval_on_selector_all(
                f'#{name} svg',
                'all => all.filter(each => each.getBoundingClientRect().width > 250).length',
            )
            assert shown == count, name
        sizes = page.eval_on_selector_all('#pictures img', 'all => all.map(each => each.naturalWidth)')
        assert sizes == [480] * 4


def test_a_class_that_fell_stands_out(browser, pages):
    with Watched(browser, pages['one'], 390) as watched:
        fell = watched.page.query_selector('#classes td.fell')
        row = watched.page.query_selector('#classes tr:has(td.fell)')
        other = watched.page.query_selector('#classes tbody tr:not(:has(td.fell))')
        colour = 'each => getComputedStyle(each).backgroundColor'

        assert fell.inner_text() == '▼ -0.160'
        assert row.evaluate(colour) != other.evaluate(colour)
        box = fell.bounding_box()
        assert box['x'] + box['width'] <= 390  # without scrolling


def test_the_keyboard_reaches_everything(browser, pages):
    with Watched(browser, pages['one']) as watched:
        page, reached = watched.page, []
        wanted = page.evaluate(
            "document.querySelectorAll('a, summary, .scroll, pre').length"
            " - document.querySelectorAll('details :is(.scroll, pre)').length"
        )
        for _ in range(wanted):
            page.keyboard.press('Tab')
            reached.append(page.evaluate('document.activeElement.outerHTML.slice(0, 120)'))
        first = reached[0]

        assert 'class="skip"' in first and len(set(reached)) >= len(reached) - 4
        assert 'BODY' not in ''.join(reached)
        page.focus('#widths summary')
        page.keyboard.press('Enter')
        assert page.is_visible('#widths details table')


def test_colours_follow_light_and_dark(browser, pages):
    grounds = []
    for scheme in ('light', 'dark'):
        with Watched(browser, pages['one'], scheme=scheme) as watched:
            grounds.append(watched.page.evaluate('getComputedStyle(document.body).backgroundColor'))

    assert grounds == ['rgb(251, 251, 250)', 'rgb(16, 20, 24)']
