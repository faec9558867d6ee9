"""Collects the figures on README and docs/ into docs/figures.json, from what the runs themselves wrote.

    python benchmarks/figures.py main_job=work_dirs/faster_rcnn_prune unpruned=work_dirs/dense
    python benchmarks/figures.py planted_faults        # runs it, in ten seconds
    python benchmarks/figures.py                       # coverage alone, and checks the pages

A source that is not named keeps its figures. ``SOURCES`` says by what command each is made (with
OMP_NUM_THREADS=1: more threads round sums otherwise), ``LINES`` where its figures stand. Ends with code
1 where a page says something else; ``tests/docs/test_figures.py`` looks at the same.
"""

import argparse
import itertools
import json
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / 'docs' / 'figures.json'
sys.path.insert(0, str(ROOT))


def report(work_dir: Path) -> dict[str, Any]:
    """What a run with a ``PruneHook`` left, from its ``prune_report.json``."""
    content = json.loads((work_dir / 'prune_report.json').read_text())
    for each in (content['flops'], content['params'], *content['channels'].values()):
        each['left'] = round(100 * each['after'] / each['before'], 4)
    parts = {name.replace('.', '_'): widths for name, widths in content['channels'].items()}
    metrics = {which: plain(found) for which, found in content['metrics'].items()}
    return {'flops': content['flops'], 'params': content['params'], 'channels': parts} | metrics


def last_metrics(work_dir: Path) -> dict[str, float]:
    """The last validation of a run that was not pruned, or what ``tools/test.py`` found."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json')) + sorted(work_dir.glob('*/*.json'))
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return plain([row for row in rows if any('AP' in name for name in row)][-1])


NAMES = {
    'iteration': 'iteration', 'PCK': 'PCK',
    'coco/AP': 'AP', 'coco/AP .5': 'AP50', 'coco/AP .75': 'AP75',
    'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50', 'coco/bbox_mAP_75': 'AP75',
}  # fmt: skip
"""What metrics are called in a template."""


def plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {NAMES[name]: value for name, value in metrics.items() if name in NAMES}


def overhead(path: Path) -> dict[str, Any]:
    """The rows that ``benchmarks/overhead.py --configs --out FILE`` wrote."""
    from benchmarks.overhead import in_steps

    found = {}
    for row in json.loads(path.read_text()):
        told = in_steps(row)
        name = Path(row['config']).stem.removeprefix('td-hm_').split('_8x')[0].split('_1x')[0]
        found[name.replace('-', '_')] = told | {'choice': told['choose'] + told['plan']}
    return found


def coverage(path: Path) -> dict[str, Any]:
    from tools.coverage import verdict

    rows = json.loads(path.read_text())
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        for zoo in (row['name'].split('/')[0], 'all'):
            each = found.setdefault(zoo, {'built': 0, 'exact': 0})
            each['built'] += verdict(row) != 'does not build'
            each['exact'] += verdict(row) == 'exact'
    return found


def planted_faults(_: Path) -> dict[str, int]:
    from tests.helpers.planted_faults import plant_faults

    found = plant_faults()
    return found | {'missed': len(found['missed'])}


@dataclass(frozen=True)
class Source:
    command: str
    collect: Callable[[Path], dict[str, Any]]
    path: str = ''
    """Where its figures always are."""


TEST = 'python tools/test.py CONFIG model.onnx'
SOURCES = {
    'main_job': Source('python tools/train.py configs/faster_rcnn_prune.py', report),
    'tutorial': Source('python tools/train.py my_config.py', report),
    'unpruned': Source('python tools/train.py configs/_base_/faster_rcnn_shapes.py', last_metrics),
    'simple_baseline': Source(
        'python tools/train.py configs/keypoint/simple_baseline_prune.py', report
    ),
    'onnxruntime': Source(TEST, last_metrics),
    'openvino': Source(TEST, last_metrics),
    'int8_onnxruntime': Source(TEST, last_metrics),
    'int8_openvino': Source(TEST, last_metrics),
    'overhead': Source('python benchmarks/overhead.py --configs', overhead),
    'coverage': Source('python tools/coverage.py', coverage, 'docs/coverage.json'),
    'planted_faults': Source('tests/unit/check/test_planted_faults.py', planted_faults, '.'),
}


def cut_row(label: str, size: str, key: str) -> str:
    cells = ['step]:.2f} s', *(f'{part}]:.2f}}' for part in ('trace', 'choice', 'check', 'cut'))]
    cells += ['first]:.2f}', 'later]:.2f}', 'memory]:.2f} GB', 'peak]:.2f}']
    return f'| {label} | {size} | ' + ' | '.join(f'{{overhead[{key}][{cell}' for cell in cells) + ' |'


def boxed(label: str, key: str) -> str:
    """A row of the table that a run ends with."""
    return f'│ {label:28} │ {{{key}[before]:>11,}} │ {{{key}[after]:>11,}} │ {{{key}[left]:.1f}}% │'


def measured(run: str, label: str, key: str, form: str) -> str:
    cells = (f'{{{run}[{which}][{key}]:>11{form}}}' for which in ('unpruned', 'pruned'))
    return f'│ {label:28} │ {" │ ".join(cells)} │'


def with_ap(label: str, key: str) -> str:
    return f'| {label} | {{{key}[AP]:.3f}} | {{{key}[AP50]:.3f}} | '


def table(run: str) -> list[str]:
    """The rows of the table that a run of Faster R-CNN ends with."""
    return [
        boxed('FLOPs', f'{run}[flops]'),
        boxed('parameters', f'{run}[params]'),
        boxed('channels: backbone', f'{run}[channels][backbone]'),
        boxed('channels: neck', f'{run}[channels][neck]'),
        boxed('channels: rpn_head', f'{run}[channels][rpn_head]'),
        boxed('channels: roi_head.bbox_head', f'{run}[channels][roi_head_bbox_head]'),
        measured(run, 'iteration', 'iteration', ','),
        measured(run, 'coco/bbox_mAP', 'AP', '.3f'),
        measured(run, 'coco/bbox_mAP_50', 'AP50', '.3f'),
        measured(run, 'coco/bbox_mAP_75', 'AP75', '.3f'),
    ]


LINES = {
    'docs/tutorial.md': [
        *table('tutorial'),
        'training ended with, {tutorial[pruned][AP]:.3f}.',
    ],
    'README.md': [
        'with FPN to {main_job[flops][left]:.1f} % of its FLOPs '
        'and {main_job[params][left]:.1f} % of its '
        'parameters while it trains: AP {main_job[pruned][AP]:.3f}, where the unpruned one gets '
        '{unpruned[AP]:.3f} in as many epochs.',
        'all {coverage[all][exact]} that build on a CPU are exact',
    ],
    'docs/results.md': [
        *table('main_job'),
        '| pruned | {main_job[flops][left]:.1f} % | {main_job[params][left]:.1f} % '
        '| {main_job[pruned][AP]:.3f} | {main_job[pruned][AP50]:.3f} | ',
        '| unpruned | 0.35 G | 3.89 M | {unpruned[AP]:.3f} | {unpruned[AP50]:.3f} | ',
        '| Simple Baseline R18, pruned in epochs 6 to 8 | 12 | {simple_baseline[flops][left]:.1f} % '
        '| {simple_baseline[params][left]:.1f} % | {simple_baseline[pruned][AP]:.3f} '
        '| {simple_baseline[pruned][AP50]:.3f} | {simple_baseline[pruned][PCK]:.3f} |',
    ],
    'docs/deploy.md': [
        with_ap('PyTorch, the pruned checkpoint', 'main_job[pruned]'),
        with_ap('ONNX Runtime, fixed size', 'onnxruntime'),
        with_ap('OpenVINO, fixed size', 'openvino'),
        with_ap('int8, ONNX Runtime', 'int8_onnxruntime'),
        with_ap('int8, OpenVINO', 'int8_openvino'),
    ],
    'docs/cuts.md': [
        cut_row('Faster R-CNN R50-FPN', '800 x 1333', 'faster_rcnn_r50_fpn'),
        cut_row('Mask R-CNN R50-FPN', '800 x 1333', 'mask_rcnn_r50_fpn'),
        cut_row('RetinaNet R50-FPN', '800 x 1333', 'retinanet_r50_fpn'),
        cut_row('RTMDet-s', '640 x 640', 'rtmdet_s'),
        cut_row('RTMPose-m', '256 x 192', 'rtmpose_m'),
        cut_row('HRNet-W32', '256 x 192', 'hrnet_w32'),
        'plants faults into {planted_faults[planted]} exact cuts of random networks',
        'the {planted_faults[matter]} that\nchange the result by more than 2e-4 are all found',
    ],
    'docs/coverage.md': [
        f'## {zoo}: {{coverage[{zoo}][exact]}} exact of {{coverage[{zoo}][built]}} that build'
        for zoo in ('mmdet', 'mmpose', 'torchvision')
    ],
}
"""{page: what it says, with its figures by source}. White space is as good as a line's end."""

NUMBER = r'[-+]?\d[\d.,]*'


def contradictions(figures: dict[str, Any], pages: dict[str, str]) -> list[str]:
    """What a page lacks, or any page says with other numbers. ``pages``: {name: text}."""
    values = {name: source['values'] for name, source in figures.items()}
    complaints = []
    right: dict[str, set[str]] = {}
    """{skeleton: what it may say}: the same table is on several pages, each of a run of its own."""
    for template in itertools.chain(*LINES.values()):
        right.setdefault(skeleton(template), set()).add(spaced(template.format(**values)))
    for page, templates in LINES.items():
        for template in templates:
            wanted = spaced(template.format(**values))
            found = re.compile(skeleton(template))
            if wanted not in spaced(pages[page]):
                complaints.append(f'{page} lacks: {wanted}')
            for name, text in pages.items():
                others = {match[0] for match in found.finditer(spaced(text))} - right[found.pattern]
                complaints += [f'{name} says: {other}; docs/figures.json: {wanted}' for other in others]
    return complaints


def spaced(text: str) -> str:
    return re.sub(r'\s+', ' ', text)


def skeleton(template: str) -> str:
    """A pattern for the template with any numbers in it."""
    parts = string.Formatter().parse(template)
    joined = ''.join(
        re.escape(spaced(text)) + (rf'\s*{NUMBER}' if field else '') for text, field, *_ in parts
    )
    return joined.replace(r'\ \s*', r'\s+')


def pages_of(root: Path = ROOT) -> dict[str, str]:
    files = [root / 'README.md', *sorted((root / 'docs').glob('*.md'))]
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('sources', nargs='*', metavar='NAME[=PATH]', help=', '.join(SOURCES))
    given = dict((each + '=').split('=')[:2] for each in parser.parse_args().sources)
    unknown = [name for name in given if name not in SOURCES]
    if unknown:
        parser.error(f'{unknown[0]} is not a source: expected one of {", ".join(SOURCES)}')
    figures = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, path in ({'coverage': ''} | given).items():
        source = SOURCES[name]
        if not (path or source.path):
            parser.error(f'{name}=PATH: name the folder that `{source.command}` wrote')
        values = source.collect(Path(path) if path else ROOT / source.path)
        figures[name] = {'command': source.command, 'values': values}
    ordered = {name: figures[name] for name in SOURCES if name in figures}
    FILE.write_text(json.dumps(ordered, indent=1) + '\n')
    complaints = contradictions(ordered, pages_of())
    sys.exit('\n'.join(complaints) if complaints else 0)


if __name__ == '__main__':
    main()
