"""Pages of runs, whole and damaged."""

import json
import re

import pytest

from mmprune.mm.recording import record
from mmprune.mm.recording.page import write_page
from mmprune.mm.recording.reading import read_run
from tests.helpers import records

SECTIONS = ['result', 'widths', 'history', 'scores', 'classes', 'pictures', 'locked', 'config']


def page(*folders, out=None):
    return write_page(folders, out).read_text()


def told(text):
    """What stands in a page, without its elements."""
    body = re.sub(r'<(style|svg).*?</\1>', ' ', text, flags=re.S)
    return ' '.join(re.sub(r'<[^>]+>', ' ', body).split())


@pytest.fixture
def run(tmp_path):
    return records.write(tmp_path / 'run')


def test_every_section_is_there_and_nothing_is_missing(run):
    text = page(run)

    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert not [word for word in ('damaged', 'not recorded', 'No pictures') if word in text]
    assert len(text) < 3e6
    words = told(text)
    for figure in ('50.0%', '4 M to 2 M', '0.420', '0.410', '4,000,000', '2.13.0', 'my_config.py'):
        assert figure in words, figure
    assert text.count('data:image/jpeg') == 4


def test_a_class_that_fell_comes_first_and_is_marked(run):
    text = page(run)

    names = re.findall(r'<th scope="row" class=" ">(square|circle|star|none)</th>', text)
    assert names == ['star', 'circle', 'square', 'none']
    assert 'bbox AP fell for star ( -0.160).' in told(text).replace('star (-', 'star ( -')
    assert re.search(r'class="number fell"><span aria-hidden="true">▼ </span>-0.160', text)


def test_every_layer_has_a_bar_and_a_row(run):
    text = page(run)

    names = [entry[1] for entry in records.content()['layers']]
    for name in names:
        assert f'<code>{name}</code>' in text
    titles = re.findall(r'<title>([^<]+): 64 to \d+</title>', text)
    assert titles[: len(names) // 2] == names[: len(names) // 2]  # in the order of the network


def test_times_of_the_benchmark_come_first(run):
    row = {
        'mode': 'onnxruntime',
        'batch': 1,
        'unpruned': {'median_ms': 8.0},
        'pruned': {'median_ms': 3.0},
    }
    failed = {'mode': 'openvino', 'batch': 1, 'failure': 'no'}
    (run / 'benchmark.json').write_text(json.dumps({'rows': [failed, row]}))

    assert read_run(run).time_left == 0.375
    assert 'onnxruntime, batch of 1' in told(page(run))
    assert 'Times of inference were not measured' not in page(run)


def test_without_a_benchmark_the_time_is_that_of_the_cuts_then_that_of_steps(run):
    assert read_run(run).time_left == pytest.approx(0.6)
    cuts = [{**cut, 'latency': None} for cut in records.content()['history']]
    records.change(run, history=cuts)

    (how, before, after, unit), *_ = read_run(run).times
    # Steps before iteration 110 and after 141.
    assert (before, after, unit) == (pytest.approx(0.3 - 0.055), pytest.approx(0.3 - 0.171), 's')


# -- what is not as it should be -------------------------------------------------------------------


def test_a_run_that_was_killed(run):
    records.change(run, finished=False, iteration=130)

    assert 'This run has not come to its end: what stands here is of iteration 130 of 200' in told(
        page(run)
    )


def test_a_run_without_cuts(run):
    path = run / record.FOLDER / record.FILE
    content = json.loads(path.read_text())
    for name in ('history', 'flops', 'params', 'channels', 'budget', 'scores'):
        del content[name]
    path.write_text(json.dumps(content))

    words = told(page(run))

    assert 'No cut was made' in words and 'No scores were recorded' in words
    assert 'damaged' not in words


def test_a_foreign_folder(tmp_path):
    (tmp_path / 'holiday.jpg').write_bytes(b'x')

    words = told(page(tmp_path))

    assert 'Nothing of a run with a PruneHook is here' in words and 'holiday.jpg' in words


def test_an_empty_folder(tmp_path):
    assert 'The folder is empty' in told(page(tmp_path))


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('{"format": 1, "fin', 'it is damaged'),
        ('\x00\xff', 'it is damaged'),
        ('[]', 'it is not a record of mmprune'),
        ('{"format": 7}', 'it has format 7, and this mmprune reads 1'),
    ],
)
def test_a_record_that_can_not_be_read(run, text, why):
    (run / record.FOLDER / record.FILE).write_text(text)

    words = told(page(run))

    assert f'record.json can not be used: {why}' in words
    assert 'None' not in words


def test_an_older_run_has_what_its_report_says(tmp_path):
    content = records.content()
    names = 'flops', 'params', 'channels', 'metrics', 'history', 'locked', 'failed'
    (tmp_path / 'prune_report.json').write_text(json.dumps({name: content[name] for name in names}))

    text = page(tmp_path)

    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert 'rests on prune_report.json alone' in told(text) and '50.0%' in told(text)
    assert 'damaged' not in text


@pytest.mark.parametrize('name', sorted(records.content().keys() - {'format', 'finished', 'iteration'}))
@pytest.mark.parametrize('value', [None, 3, 'x', [1], {'a': 1}, [[1, 2]], {'unpruned': 5}])
def test_whatever_a_part_of_the_record_is_the_page_is_made(run, name, value):
    records.change(run, **{name: value})

    text = page(run)

    assert re.findall(r'<section id="(\w+)"', text) == SECTIONS
    assert page(run, run, out=run / 'two.html')


def test_pictures_whose_copies_are_gone(run):
    (run / record.FOLDER / '1.jpg').unlink()

    text = page(run)

    assert text.count('data:image/jpeg') == 2
    assert 'No copy of these pictures is in the work directory: /data/val/b.png' in told(text)


def test_a_copy_that_is_no_picture(run):
    (run / record.FOLDER / '1.jpg').write_bytes(b'no picture')

    assert 'damaged' in told(page(run))


# -- several ---------------------------------------------------------------------------------------


def test_several_runs_side_by_side(tmp_path):
    runs = [
        records.write(tmp_path / name, left=left, criterion=criterion)
        for name, left, criterion in (('a', 0.5, 'taylor'), ('b', 0.3, 'taylor'), ('c', 0.5, 'l2'))
    ]

    text = page(*runs, out=tmp_path / 'out.html')

    words = told(text)
    assert re.findall(r'<section id="(\w+)"', text) == ['runs', 'curves', 'parts', 'classes', 'configs']
    assert 'a keep_flops=0.5 taylor per flops 4 50.0% 50.0% 60.0%' in words
    assert 'b keep_flops=0.3 taylor per flops 4 30.0% 30.0% 44.0%' in words
    assert '-keep = 0.5 +keep = 0.3' in words and 'c : the same as a' in words
    # A line for each criterion, a mark for each run.
    marks = re.findall(r'<title>([abc]): [\d.]+, [\d.]+</title>', text)
    assert sorted(marks) == sorted(['a', 'b', 'c'] * 2 * 2)  # two drawings at two widths
    assert 'taylor per flops' in words and 'l2 per flops' in words


def test_runs_whose_folders_have_the_same_name_are_told_apart(tmp_path):
    runs = [records.write(tmp_path / name / 'run') for name in ('x', 'y')]

    assert 'Pruning: x/run, y/run' in told(page(*runs, out=tmp_path / 'out.html'))


def test_one_that_can_not_be_read_beside_others(tmp_path, run):
    text = page(run, tmp_path, out=tmp_path / 'out.html')

    words = told(text)
    assert 'Nothing of a run with a PruneHook is here' in words
    assert '1 of 2 runs side by side' in words


def test_none_that_can_be_read(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()

    assert (
        told(page(tmp_path / 'a', tmp_path / 'b', out=tmp_path / 'o.html')).count('Nothing of a run')
        == 2
    )
