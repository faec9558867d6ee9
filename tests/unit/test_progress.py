"""A bar comes when something takes long, on a terminal, and is gone afterwards."""

import io

import torch
from rich import progress as rich_progress
from torch import nn

import mmprune
from mmprune import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """From here on standard error is one. (Not as a fixture: pytest sets its own between both.)"""
    screen = Terminal()
    monkeypatch.setattr('sys.stderr', screen)
    monkeypatch.setenv('TERM', 'xterm')
    return screen


def test_what_is_over_soon_shows_nothing(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress.bar('Tracing', 10) as tell:
        for number in range(10):
            tell(number)
    assert terminal.getvalue() == ''


def test_what_takes_long_shows_how_far_it_is(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress.bar('Tracing', 8, patience=0) as tell:
        tell(2)
    assert 'Tracing' in terminal.getvalue() and '25%' in terminal.getvalue()


def test_where_there_is_no_terminal_nothing_is_written(capsys):
    with progress.bar('Tracing', 8, patience=0) as tell:
        tell(2)
    assert capsys.readouterr() == ('', '')


def test_beside_another_bar_that_allows_no_second_one_work_goes_on(monkeypatch):
    terminal = on_terminal(monkeypatch)

    def refuse(self):
        raise progress.LiveError('only one')

    monkeypatch.setattr(rich_progress.Progress, 'start', refuse)
    with progress.bar('Tracing', 8, patience=0) as tell:
        tell(2)
        tell(3)
    assert terminal.getvalue() == ''


def test_a_trace_tells_how_far_it_is_through_all_of_its_runs(monkeypatch):
    told = []

    class Told:
        def __init__(self, description, total):
            assert (description, total) == ('Tracing', 2 * 4)

        def __enter__(self):
            return told.append

        def __exit__(self, *args):
            pass

    monkeypatch.setattr('mmprune.graph.tracer.bar', Told)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    run = lambda m: m(torch.zeros(1, 3, 2, 2))  # noqa: E731
    mmprune.trace(model, run, also=(lambda m: run(m),))
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]
