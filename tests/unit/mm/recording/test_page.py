"""Pages of runs, whole and damaged."""

import json
import re

import pytest

from mmprune.mm.recording import course, record
from mmprune.mm.recording.page import write_page
from mmprune.mm.recording.reading import read_run
from tests.helpers import records

SECTIONS = ['result', 'times', 'widths', 'history', 'scores', 'classes', 'pictures', 'locked', 'config']


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

    timing = read_run(run).times[0]
    assert (timing.runtime, timing.before, timing.after) == ('onnxruntime', 8.0, 3.0)
    words = told(page(run))
    assert 'Speed in onnxruntime 2.7 x as fast 8 ms to 3 ms, batch of 1' in words
    assert 'onnxruntime batch of 1, tools/benchmark.py 8 ms 3 ms 2.7 x as fast' in words
    assert 'were not timed' not in words and 'ime left' not in words


def row_of(mode, before, after):
    return {'mode': mode, 'batch': 1, 'unpruned': {'median_ms': before}, 'pruned': {'median_ms': after}}


def test_the_speed_is_that_of_the_runtime_that_was_asked_for(run):
    rows = [row_of('eager', 8.0, 7.0), row_of('openvino', 8.0, 5.0)]
    (run / 'benchmark.json').write_text(json.dumps({'rows': rows}))
    history = [{**cut, 'latency': None} for cut in records.content()['history']]
    records.change(run, budget={'keep_flops': 0.5, 'backend': 'openvino'}, history=history)
    assert 'Speed in openvino 1.6 x as fast' in told(page(run))

    records.change(run, budget={'latency': 0.5, 'backend': 'onnxruntime'})
    words = told(page(run))
    assert 'Speed in' not in words  # it was not measured there
    assert 'no times in onnxruntime, the runtime of the budget' in words
    assert '--modes onnxruntime' in words

    records.change(run, budget={'latency': 0.5})
    assert 'Speed in eager 1.1 x as fast' in told(page(run))


def test_times_are_a_table_of_their_own_and_a_slower_network_is_called_slower(run):
    (run / 'benchmark.json').write_text(json.dumps({'rows': [row_of('eager', 8.0, 10.0)]}))
    text = page(run)
    result, times = (
        told(re.search(rf'<section id="{name}".*?</section>', text, re.S)[0])
        for name in ('result', 'times')
    )
    assert 'as fast' not in result and 'FLOPs 4,000,000' in result
    assert 'eager batch of 1, tools/benchmark.py 8 ms 10 ms 0.80 x as fast' in times
    assert 'eager at the last cut 1 0.6 1.7 x as fast' in times


def test_without_a_benchmark_the_time_is_that_of_the_cuts_then_that_of_steps(run):
    first = read_run(run).times[0]
    assert (first.runtime, first.before, first.after) == ('eager', 1.0, pytest.approx(0.6))
    cuts = [{**cut, 'latency': None} for cut in records.content()['history']]
    records.change(run, history=cuts)

    (step,) = read_run(run).times
    # Steps before iteration 110 and after 141.
    assert (step.before, step.after) == (pytest.approx(0.3 - 0.055), pytest.approx(0.3 - 0.171))
    assert step.unit == 's' and read_run(run).headline_time is None


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

    words = told(page(run))
    assert 'Some pictures could not be drawn' in words and 'damaged' not in words


# -- what a cut did to the loss --------------------------------------------------------------------


def test_cuts_at_which_the_loss_jumped_are_marked(run):
    text = page(run)

    words = told(text)
    assert 'At cut 3 (iteration 130) the loss of the same batch jumped from 0.900 to 2.100.' in words
    assert words.count('the loss of the same batch jumped from') == 1
    assert 'It narrowed neck.lateral.weight[0] , neck.top.weight[0] .' in words
    assert re.search(r'class="number fell">.{1,60}2\.100</td>', text)
    assert '4 140 0.900 0.950 3' in words  # how many layers were not compensated


@pytest.mark.parametrize(
    ('before', 'after', 'jumped'),
    [(1.0, 1.5, 0), (1.0, 1.51, 1), (-1.0, -0.6, 0), (-1.0, 0.1, 1), (1.0, float('nan'), 1)],
)
def test_a_jump_is_a_rise_by_more_than_half(before, after, jumped):
    assert course.has_jumped({'before': before, 'after': after}) == jumped


def test_a_loss_that_became_no_number_is_marked(run):
    entry = records.content()['jumps'][0] | {'after': float('nan')}
    records.change(run, jumps=[entry])

    words = told(page(run))
    assert 'jumped from 0.900 to no number' in words and 'damaged' not in words


def test_groups_that_the_data_hardly_uses_are_told(run):
    words = told(page(run))
    assert 'The data hardly uses 1 of the groups of channels' in words
    assert 'neck.coarse.weight[0] 16 4.0e-04' in words


@pytest.mark.parametrize('name', ['jumps', 'idle', 'tested'])
def test_records_of_older_runs_lack_what_was_not_noted_then(run, name):
    path = run / record.FOLDER / record.FILE
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))

    text = page(run)

    assert 'damaged' not in text
    assert ('of the same batch' in text, 'hardly uses' in text) == (name != 'jumps', name != 'idle')


def test_scores_and_tensor_names_are_folded_away(run):
    text, count = page(run), 1
    while count:  # from the innermost out
        text, count = re.subn(r'<details>((?!<details>).)*?</details>', ' ', text, flags=re.S)
    shown = told(text)

    for name in ('a_long_name', 'head.cls.weight', 'Units of the last cut by part', 'neck.coarse'):
        assert name not in shown, name
    assert 'output of the model 3' in shown  # the locked units by reason
    assert 'At iteration 140 435 units stayed and 25 went' in shown


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_say_what_is_annotated_and_why_fewer_boxes_may_be_better(run):
    words = told(page(run))

    assert 'a.png: 1 annotated' in words and 'drawn in white: boxes dashed' in words
    assert 'Fewer boxes can mean a better AP.' in words


# -- several ---------------------------------------------------------------------------------------


def test_several_runs_side_by_side(tmp_path):
    runs = [
        records.write(tmp_path / name, left=left, criterion=criterion)
        for name, left, criterion in (('a', 0.5, 'taylor'), ('b', 0.3, 'taylor'), ('c', 0.5, 'l2'))
    ]

    text = page(*runs, out=tmp_path / 'out.html')

    words = told(text)
    assert re.findall(r'<section id="(\w+)"', text) == ['runs', 'curves', 'parts', 'classes', 'configs']
    assert 'a keep_flops=0.5 taylor per flops 4 50.0% 50.0% 1.7 x as fast' in words
    assert 'b keep_flops=0.3 taylor per flops 4 30.0% 30.0% 2.3 x as fast' in words
    assert '-keep_flops = 0.5 +keep_flops = 0.3' in words and 'c : the same as a' in words
    # A line for each criterion, a mark for each run.
    marks = re.findall(r'<title>([abc]): [\d.]+, [\d.]+</title>', text)
    assert sorted(marks) == sorted(['a', 'b', 'c'] * 2 * 2)  # two drawings at two widths
    assert 'taylor per flops' in words and 'l2 per flops' in words


def lines_in(text):
    """Points of each line in the first drawing of a page."""
    drawing = re.search(r'<div class="drawing wide".*?</div>', text, re.S)[0]
    return [len(points.split()) for points in re.findall(r'<polyline points="([^"]+)"', drawing)]


def test_a_line_joins_runs_that_differ_in_the_amount_of_their_budget_alone(tmp_path):
    runs = [records.write(tmp_path / n, left=left) for n, left in (('a', 0.5), ('b', 0.4), ('c', 0.3))]
    assert lines_in(page(*runs, out=tmp_path / 'out.html')) == [3]

    for changed in (
        {'max_iters': 400},
        {'config': {'file': '', 'text': 'keep_flops = 0.3\n' + 'x = 2\n' * 50}},
        {'budget': {'latency': 0.5}},
        {'flops': {'before': 9_000_000, 'after': 3_000_000}},
    ):
        records.write(tmp_path / 'c', left=0.3)
        records.change(tmp_path / 'c', **changed)
        text = page(*runs, out=tmp_path / 'out.html')
        assert lines_in(text) == [2], changed
        assert 'taylor per flops: b, a' in told(text) and 'taylor per flops: c' in told(text)


def test_runs_that_were_tested_on_different_pictures_are_in_no_common_drawing(tmp_path):
    runs = [records.write(tmp_path / n, left=left) for n, left in (('a', 0.5), ('b', 0.4), ('c', 0.3))]
    other = {'data_set': 'CocoDataset', 'count': 9, 'files': ['x.png']}
    records.change(tmp_path / 'c', tested=other)

    text = page(*runs, out=tmp_path / 'out.html')

    words = told(text)
    assert 'tested on different pictures' in words
    assert 'a , b : 60 pictures (a.png ...); c : 9 pictures (x.png ...)' in words
    drawings = re.findall(r'<div class="drawing wide".*?</div>', text, re.S)
    marks = [re.findall(r'<title>([abc]): ', each) for each in drawings]
    assert marks == [['b', 'a'], ['b', 'a'], ['c'], ['c']]
    # Nor is a class of one set marked against the best of the other.
    assert words.count('bbox AP of the pruned networks') == 2


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
