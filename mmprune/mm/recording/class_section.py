"""The section that shows a class or a keypoint that fell."""

from mmprune.mm import pages
from mmprune.mm.pages.numbers import change, score
from mmprune.mm.pages.page import Block
from mmprune.mm.recording.reading import Run

FELL = 0.02
"""A change by more than this is marked, to either side."""


def by_class(run: Run) -> list[Block]:
    """A table for each metric, the largest loss first."""
    both = run.content.get('classes') or {}
    metrics = [each['metric'] for values in both.values() for each in values]
    if not metrics:
        return [
            pages.Notice(
                "Not known: of the config's metrics none says it. Those that compute with pycocotools "
                '(boxes, masks) do, and `VOCMetric` and `PCKAccuracy`; for keypoints add '
                "`dict(type='PCKAccuracy')` to `val_evaluator`."
            )
        ]
    return [block for metric in dict.fromkeys(metrics) for block in _one(metric, both)]


def _one(metric: str, both: dict[str, list[dict]]) -> list[Block]:
    before, after = (
        next((each['values'] for each in both.get(which, []) if each['metric'] == metric), {})
        for which in ('unpruned', 'pruned')
    )
    names = list({**before, **after})
    changes = {name: _difference(before.get(name), after.get(name)) for name in names}
    names.sort(key=lambda name: changes[name] if changes[name] is not None else 9)
    most = max([v for v in [*before.values(), *after.values()] if v] or [1])
    rows = []
    for name in names:
        was, now, gain = before.get(name), after.get(name), changes[name]
        mark = '' if gain is None or abs(gain) <= FELL else 'fell' if gain < 0 else 'rose'
        rows.append(
            [
                name,
                pages.Cell(change(was, now), mark=mark),
                pages.Cell('', share=(now or 0) / most, of=(was or 0) / most),
                score(was), score(now),
            ]
        )  # fmt: skip
    heads = ['name', 'change', metric, 'unpruned', 'pruned']
    caption = f'{metric}, the largest loss first; pale: unpruned, filled: pruned'
    blocks: list[Block] = []
    fell = [name for name in names if (changes[name] or 0) < -FELL]
    if fell:
        told = ', '.join(f'`{name}` ({changes[name]:+.3f})' for name in fell[:8])
        more = f' and {len(fell) - 8} more' if len(fell) > 8 else ''
        blocks.append(pages.Notice(f'{metric} fell for {told}{more}.', 'warning'))
    elif all(changes[name] is not None for name in names):
        blocks.append(pages.Text(f'{metric}: none fell by more than {FELL}.'))
    table = pages.Table(caption, heads, rows, ['change', 'unpruned', 'pruned'], [metric])
    return [*blocks, table]


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
