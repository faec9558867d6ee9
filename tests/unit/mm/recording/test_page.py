"""Pages of runs that have ended, and of others."""

import json
import re

import pytest

import mmprune
from mmprune.mm.recording import record
from mmprune.mm.recording.record import read_run
from mmprune.mm.recording.run_page import write_page
from mmprune.mm.report import has_jumped
from tests.helpers import records

SECTIONS = ['result', 'times', 'widths', 'history', 'scores', 'classes', 'pictures', 'locked', 'config']


def page(folder, out=None):
    return write_page(folder, out).read_text()


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
    assert not [word for word in ('not recorded', 'There are no pictures', 'None') if word in text]
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


def test_without_a_benchmark_the_time_is_that_of_the_last_cut(run):
    (timing,) = read_run(run).times
    assert (timing.runtime, timing.before, timing.after) == ('eager', 1.0, pytest.approx(0.6))
    cuts = [{**cut, 'latency': None} for cut in records.content()['history']]
    records.change(run, history=cuts)

    assert read_run(run).main_time is None and 'as fast' not in page(run)


# -- what is not as it should be -------------------------------------------------------------------


def test_a_run_that_was_killed(run):
    records.change(run, finished=False, iteration=130)

    text = 'This run has not reached its end. The page shows iteration 130 of 200'
    assert text in told(page(run))


def test_a_run_without_cuts(run):
    path = run / record.RECORD_FOLDER / record.RECORD_FILE
    content = json.loads(path.read_text())
    for name in ('history', 'flops', 'params', 'channels', 'budget', 'scores'):
        del content[name]
    path.write_text(json.dumps(content))

    words = told(page(run))

    assert 'No cut was made' in words and 'No scores were recorded' in words


def test_a_folder_without_a_record_is_an_error(tmp_path):
    with pytest.raises(mmprune.PruneError, match='record.json does not exist: give the work directory'):
        page(tmp_path)


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('{"format": 1, "fin', 'can not be read: '),
        ('\x00\xff', 'can not be read: '),
        ('[]', 'mmprune did not write it'),
        ('{"format": 7}', 'has format 7, and this version of mmprune reads format 1'),
    ],
)
def test_a_record_that_can_not_be_read_is_an_error(run, text, why):
    (run / record.RECORD_FOLDER / record.RECORD_FILE).write_text(text)

    with pytest.raises(mmprune.PruneError, match=f'record.json {why}|record.json .*{why}'):
        page(run)


def test_pictures_whose_copies_are_gone(run):
    (run / record.RECORD_FOLDER / '1.jpg').unlink()

    text = page(run)

    assert text.count('data:image/jpeg') == 2
    assert 'The work directory has no copy of these pictures: /data/val/b.png' in told(text)


def test_a_copy_that_is_no_picture(run):
    (run / record.RECORD_FOLDER / '1.jpg').write_bytes(b'no picture')

    words = told(page(run))
    assert 'Some pictures could not be drawn' in words


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
    assert has_jumped(before, after) == jumped


def test_a_loss_that_became_no_number_is_marked(run):
    entry = records.content()['jumps'][0] | {'after': float('nan')}
    records.change(run, jumps=[entry])

    words = told(page(run))
    assert 'jumped from 0.900 to no number' in words


def test_groups_that_the_data_hardly_uses_are_told(run):
    words = told(page(run))
    assert 'The data hardly uses 1 of the groups of channels' in words
    assert 'neck.coarse.weight[0] 16 4.0e-04' in words


@pytest.mark.parametrize('name', ['jumps', 'idle'])
def test_records_of_older_runs_lack_what_was_not_noted_then(run, name):
    path = run / record.RECORD_FOLDER / record.RECORD_FILE
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))

    text = page(run)

    assert ('of the same batch' in text, 'hardly uses' in text) == (name != 'jumps', name != 'idle')


def test_scores_and_tensor_names_are_folded_away(run):
    text, count = page(run), 1
    while count:  # from the innermost out
        text, count = re.subn(r'<details>((?!<details>).)*?</details>', ' ', text, flags=re.S)
    shown = told(text)

    for name in ('a_long_name', 'head.cls.weight', 'Units of the last cut by part', 'neck.coarse'):
        assert name not in shown, name
    assert 'output of the model 3' in shown  # the locked units by reason
    assert 'At iteration 140, 435 units stayed and 25 were removed.' in shown


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_say_what_is_annotated_and_why_fewer_boxes_may_be_better(run):
    words = told(page(run))

    assert 'a.png: 1 annotated' in words and 'White marks are annotations: dashed boxes' in words
    assert 'Fewer boxes can mean a better AP.' in words
