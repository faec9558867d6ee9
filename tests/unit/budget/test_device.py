"""What a device works in: from times, from this machine, from disk."""

import json
import logging

import pytest
import torch

from mmprune.budget import device

CPU = torch.device('cpu')


def stairs(block, noise=0.0):
    """Seconds of widths on a machine that works in blocks: half of the time by block."""

    def time(width):
        up = -(-width // block) * block
        return up**2 + 20 * up + 1000 + noise * (width * 7919 % 13 - 6)

    return {width: float(time(width)) for width in device.WIDTHS}


@pytest.mark.parametrize('block', [4, 8, 16, 32])
@pytest.mark.parametrize('noise', [0.0, 3.0])
def test_the_divisor_is_the_block_that_the_machine_works_in(block, noise):
    """Of blocks of 4 the gain is 5 % of a width around 64 or less, and not worth a restriction."""
    assert device.best_divisor(stairs(block, noise)) == (1 if block == 4 else block)


@pytest.mark.parametrize('noise', [0.0, 50.0])
def test_nothing_is_gained_where_time_is_smooth(noise):
    assert device.best_divisor(stairs(1, noise)) == 1


def test_a_slow_layout_beside_the_multiples_counts_as_a_step():
    """As in ONNX Runtime: a width that is no multiple of 4 takes 1.7 times as long."""
    times = {w: t if w % 4 == 0 else 1.7 * t for w, t in stairs(1).items()}
    assert device.best_divisor(times) == 4


def test_it_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(device.ENVIRONMENT, str(tmp_path / 'cache'))
    monkeypatch.setattr(device, '_divisors', {})
    monkeypatch.setattr(device, 'WIDTHS', range(33, 65))
    found = device.divisor_of(CPU, torch.float32)
    assert found in device.DIVISORS
    ((key, kept),) = json.loads((tmp_path / 'cache' / device.DIVISORS_FILE).read_text()).items()
    assert kept == found and device.device_name(CPU) in key and 'float32' in key
    monkeypatch.setattr(device, 'times_by_width', lambda *a: pytest.fail('measured again'))
    assert device.divisor_of(CPU, torch.float32) == found  # in this process
    monkeypatch.setattr(device, '_divisors', {})
    assert device.divisor_of(CPU, torch.float32) == found  # in the next


@pytest.mark.parametrize('content', ['torn {', '[1]', '{}'])
def test_what_can_not_be_read_is_measured_anew(monkeypatch, tmp_path, content):
    monkeypatch.setenv(device.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(device, '_divisors', {})
    monkeypatch.setattr(device, 'times_by_width', lambda *a: stairs(8))
    (tmp_path / device.DIVISORS_FILE).write_text(content)
    assert device.divisor_of(CPU, torch.float32) == 8
    assert list(json.loads((tmp_path / device.DIVISORS_FILE).read_text()).values()) == [8]


def test_a_measurement_that_fails_is_a_warning_and_widths_are_free(monkeypatch, tmp_path, caplog):
    def failing(*args):
        raise RuntimeError('no memory left')

    monkeypatch.setenv(device.ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(device, '_divisors', {})
    monkeypatch.setattr(device, 'times_by_width', failing)
    with caplog.at_level(logging.WARNING, 'mmprune'):
        assert [device.divisor_of(CPU, torch.float32) for _ in range(2)] == [1, 1]
    (told,) = [record.getMessage() for record in caplog.records]
    assert 'could not be measured (RuntimeError: no memory left)' in told and 'divisor=8' in told
    assert not (tmp_path / device.DIVISORS_FILE).exists()  # the next process measures


def test_a_folder_that_can_not_be_written_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv(device.ENVIRONMENT, str(tmp_path / 'file' / 'below'))
    monkeypatch.setattr(device, '_divisors', {})
    monkeypatch.setattr(device, 'times_by_width', lambda *a: stairs(16))
    assert device.divisor_of(CPU, torch.float32) == 16
    assert ('mmprune.budget.device', logging.WARNING) in [entry[:2] for entry in caplog.record_tuples]
    assert 'can not be written' in caplog.text


def test_two_keys_live_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setenv(device.ENVIRONMENT, str(tmp_path))
    device.keep_divisor('a', 1)
    device.keep_divisor('b', 8)
    assert device.read_divisors() == {'a': 1, 'b': 8}
    assert [path.name for path in tmp_path.iterdir()] == [device.DIVISORS_FILE]


def test_calls_take_turns_and_the_fastest_counts_but_for_the_first_of_each(monkeypatch):
    order = []
    seconds = {'a': iter([1, 5, 2, 3, 1, 4]), 'b': iter([0.1, 2, 0.1, 7, 0.1, 8])}

    def timed(call, at):
        order.append(call())
        return next(seconds[call()])

    monkeypatch.setattr(device, 'seconds_of_call', timed)
    found = device.least_of({'a': lambda: 'a', 'b': lambda: 'b'}, CPU, 3)
    assert found == {'a': 3, 'b': 2} and order == ['a', 'a', 'b', 'b'] * 3
