"""The page of one run: a section for each thing that one asks of a pruned network."""

from collections.abc import Callable

from mmprune.errors import PruneError
from mmprune.mm import pages
from mmprune.mm.pages.numbers import change, faster, percent, score, short, whole
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.class_section import by_class
from mmprune.mm.recording.course import history, scores
from mmprune.mm.recording.network import config, locked, widths
from mmprune.mm.recording.picture_section import found
from mmprune.mm.recording.reading import Run, Timing
from mmprune.mm.report import is_headline

Blocks = list[Block]
Make = Callable[[Run], Blocks]


def page_of(run: Run) -> pages.Page:
    """The page; a part of the record that is damaged is a section that says so."""
    sections = [
        pages.Section(name, title, guarded(make, run))
        for name, title, make in (
            ('result', 'Before and after', result),
            ('times', 'Times', times),
            ('widths', 'Width of every layer', widths),
            ('history', 'The course of the training', history),
            ('scores', 'Scores at the last cut', scores),
            ('classes', 'By class and keypoint', by_class),
            ('pictures', 'What both networks find', found),
            ('locked', 'What could not be cut', locked),
            ('config', 'Config and versions', config),
        )
    ]
    notes = [pages.Notice(text, 'warning') for text in [*run.troubles, *guarded_texts(run)]]
    if not run.content:
        return pages.Page(f'Pruning: {run.name}', str(run.folder), [], FOOT, notes)
    lead = f'Work directory `{run.folder}`'
    file = (
        run.content.get('config', {}).get('file') if isinstance(run.content.get('config'), dict) else ''
    )
    lead += f', config `{file}`' if file else ''
    return pages.Page(f'Pruning: {run.name}', lead, sections, FOOT, [*guarded(facts, run), *notes])


FOOT = (
    'FLOPs are multiply-adds of one image. Made by mmprune; make it again with '
    '`python tools/report.py WORK_DIR`.'
)

DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, PruneError)
"""What content of another shape than a run writes leads to."""


def guarded(make: Make, run: Run) -> Blocks:
    try:
        return make(run)
    except DAMAGE as error:
        text = f'This part of the record is damaged ({type(error).__name__}: {error}).'
        return [pages.Notice(text, 'warning')]


def guarded_texts(run: Run) -> list[str]:
    content, texts = run.content, []
    if content and not content.get('finished'):
        texts.append(
            'This run has not come to its end: what stands here is of iteration '
            f'{content.get("iteration", "?")} of {content.get("max_iters", "?")}, its last validation '
            'or cut. Go on with `tools/train.py ... --resume`.'
        )
    if content and not content.get('history'):
        texts.append('No cut was made (yet): the network is as wide as it was.')
    return texts


def facts(run: Run) -> Blocks:
    """The large figures."""
    found = []
    for label, key in (('FLOPs left', 'flops'), ('Parameters left', 'params')):
        pair = run.content.get(key)
        if pair:
            told = f'{short(pair["before"])} to {short(pair["after"])}'
            found.append((label, percent(run.left(key)), told))
    name = run.main_metric
    if name:
        before, after = (run.metrics[which].get(name) for which in ('unpruned', 'pruned'))
        told = f'{score(before)} before the first cut' if score(before) else ''
        found.append((name, score(after) or score(before), told if score(after) else 'unpruned'))
    timing = run.headline_time
    if timing:
        value = faster(timing.before, timing.after)
        found.append((f'Speed in {timing.runtime}', value, f'{_spent(timing)}, {timing.how}'))
    return [pages.Facts(found)] if found else []


def _spent(timing: Timing) -> str:
    """``8 ms to 3 ms``."""
    if not timing.unit:
        return f'{percent(timing.after)} of the time remains'
    return f'{short(timing.before)} {timing.unit} to {short(timing.after)} {timing.unit}'


def times(run: Run) -> Blocks:
    """The table of times, and what to do for one of the runtime that was asked for."""
    blocks: Blocks = []
    rows: list[list[str | pages.Cell]] = [
        [
            timing.runtime, timing.how,
            *(f'{short(time)} {timing.unit}'.strip() for time in (timing.before, timing.after)),
            faster(timing.before, timing.after),
        ]
        for timing in run.times
    ]  # fmt: skip
    if rows:
        heads = ['runtime', 'measured', 'unpruned', 'pruned', 'speed']
        caption = 'Times; without a unit they are fractions of the unpruned time'
        blocks.append(pages.Table(caption, heads, rows, heads[2:]))
    modes = f' --modes {run.runtime}' if run.runtime else ''
    if not run.benchmark:
        told = 'The whole networks were not timed on a machine that does nothing else.'
    elif run.headline_time is None:
        told = f'The benchmark has no times in {run.runtime}, the runtime of the budget.'
    else:
        return blocks
    command = f'python tools/benchmark.py CONFIG CHECKPOINT{modes} --json {run.folder}/benchmark.json'
    blocks.append(pages.Notice(f'{told} `{command}` does so; then make this page again.'))
    return blocks


def result(run: Run) -> Blocks:
    rows: list[list[str | pages.Cell]] = []
    content = run.content
    for label, key in (('FLOPs', 'flops'), ('parameters', 'params')):
        pair = content.get(key)
        if pair:
            numbers = [whole(pair['before']), whole(pair['after'])]
            rows.append([label, *numbers, percent(pair['after'], pair['before'])])
    for part, pair in content.get('channels', {}).items():
        numbers = [whole(pair['before']), whole(pair['after'])]
        rows.append([f'channels: {part}', *numbers, percent(pair['after'], pair['before'])])
    unpruned, pruned = run.metrics.values()
    metrics: list[list[str | pages.Cell]] = [
        [name, score(unpruned.get(name)), score(pruned.get(name)),
         change(unpruned.get(name), pruned.get(name))]
        for name in {**unpruned, **pruned} if is_headline(name) and name != 'iteration'
    ]  # fmt: skip
    blocks: Blocks = []
    if rows:
        heads = ['what', 'unpruned', 'pruned', 'left']
        blocks.append(pages.Table('What is left', heads, rows, heads[1:]))
    if metrics:
        at = [str(run.metrics[which].get('iteration', '?')) for which in ('unpruned', 'pruned')]
        heads = ['metric', 'unpruned', 'pruned', 'change']
        told = (
            f'Metrics of the unpruned network at iteration {at[0]}, the last validation before the '
            f'first cut, and of the pruned one at {at[1]}. The unpruned one was trained for less long: '
            'it is no baseline of equal training.'
        )
        blocks += [pages.Text(told), pages.Table('Metrics', heads, metrics, heads[1:])]
    else:
        blocks.append(pages.Notice('No metric was recorded: there was no validation.'))
    return blocks
