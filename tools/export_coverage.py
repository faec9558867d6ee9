"""Which families of the zoos can be exported: whole, as raw outputs, or not, and why.

    python tools/export_coverage.py                       # all of tools/coverage.txt, hours on one core
    python tools/export_coverage.py --only 'mmdet/*rcnn*' --jobs 2
    python tools/export_coverage.py --resume              # only families without a row

One model of each family is exported, with random weights and at a fixed size, in a separate process.
The file is compared with PyTorch in ONNX Runtime. After each family its result is merged into
docs/deploy.json, and at the end the table in docs/deploy.md is written from that.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.coverage import ROOT, families, warm_up  # noqa: E402

RESULTS = ROOT / 'docs' / 'deploy.json'
PAGE = ROOT / 'docs' / 'deploy.md'
FORK = multiprocessing.get_context('fork')


def examine(config: str, how: dict, pipe) -> None:
    """Sends the row of one family through a pipe: ``export`` (whole, raw or not), and the ``reason``
    if it is not whole. ``how`` has arguments of ``build``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from mmprune.errors import PruneError
    from mmprune.mm.deploy.export import export_model
    from tools.zoo import build, load

    try:
        cfg = config_of(config) or load(config)
        model, forward = build(cfg, **how)
        model.cfg = cfg
        side = how.get('size', 128)
        if cfg.get('default_scope') == 'mmdet':  # what pyramids and windows need
            side = -(-side // 64) * 64
        pose = model.cfg.get('default_scope') == 'mmpose'
        size = fixed_side(model) if pose else (side, side)
        as_trained(model, forward, size)
    except Exception as error:  # the zoo's own code may raise anything
        prefix = '' if isinstance(error, PruneError) else 'does not build: '
        return pipe.send({'export': 'not', 'reason': f'{prefix}{error}'.splitlines()[0][:200]})
    row: dict = {'reason': ''}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ('whole', 'raw'):
            out, raw = Path(folder) / f'{kind}.onnx', kind == 'raw'
            try:
                export_model(model, out, raw=raw, size=size)
                row['export'] = kind
                break
            except PruneError as error:
                reason = str(error)
            except Exception as error:  # a model's own code may raise anything
                reason = f'{type(error).__name__}: {error}'
            row['export'] = 'not'
            row['raw_reason' if raw else 'reason'] = (reason.splitlines() or [''])[0][:300]
            pipe.send(row | {'export': 'not'})
    pipe.send(row)


SPREADS = {
    'conv_offset': 0.05, 'spatial_conv_offset': 0.05, 'offset_s': 0.05, 'offset_l': 0.05,
    'sampling_offsets': 0.05, 'conv2.fc2': 0.3, 'switch': 0.5, 'pre_context': 0.1, 'post_context': 0.1,
}  # fmt: skip
"""The largest standard deviation of the outputs of some layers, by the ends of their names."""


def as_trained(model, forward, size: tuple[int, int]) -> None:
    """Limits layers whose outputs are far larger with random weights than after any training.

    Otherwise deformable convolutions sample far away in maps of noise, split attention (ResNeSt)
    chooses one half by the last bit, and contexts drown the maps that they are added to (DetectoRS).
    Rounding alone then changes most results of such a network, so that there is nothing to compare
    with.
    """
    import torch

    from mmprune.mm.deploy import check as checks
    from tools.zoo import shake

    def limited(layer, _, out, spread):
        factor = min(1.0, spread / float(out.std()))
        for parameter in layer.parameters():
            parameter.data.mul_(factor)
        return out * factor

    hooks = [
        layer.register_forward_hook(partial(limited, spread=spread))
        for name, layer in model.named_modules()
        for end, spread in SPREADS.items()
        if f'.{name}'.endswith(f'.{end}')
    ]
    if hooks:
        shake(model, forward)  # also estimates the statistics of batch norms
        pictures = checks.pictures_for(size, 32, 2)[0]
        with torch.no_grad():
            model.eval()
            model.extract_feat(checks.prepared(model, pictures)[0])
    for hook in hooks:
        hook.remove()
    # mmdet's QueryInst predicts only if all of its boxes are detections.
    queries = getattr(getattr(model, 'rpn_head', None), 'num_proposals', None)
    if queries is not None:
        model.roi_head.test_cfg.max_per_img = queries
    if queries is not None and hasattr(model.roi_head, 'mask_head'):  # it pastes no mask without pixels
        for head in model.roi_head.bbox_head:
            head.fc_reg.weight.data.mul_(0.01)
            head.fc_reg.bias.data.zero_()
        boxes = model.rpn_head.init_proposal_bboxes.weight.data
        boxes.copy_(torch.rand_like(boxes) * 0.3 + 0.3)


def config_of(config: str) -> Config | None:
    """A config with one of torchvision's classifiers; ``None`` for other names.

    Raises:
        PruneError: the torchvision model is no classifier.
    """
    if not config.startswith('torchvision::'):
        return None
    from mmprune.errors import PruneError
    from mmprune.mm.models.classifier import make_net

    name = config.removeprefix('torchvision::')
    try:
        make_net(name)
    except PruneError:
        raise PruneError(
            "a detector or segmenter of torchvision's own: no config of the stack has it"
        ) from None
    return Config({'model': dict(type='ImageClassifier', net=dict(name=name), num_classes=1000)})


def fixed_side(model) -> tuple[int, int] | None:
    """(height, width) of the images of a pose model, by its codec."""
    codec = model.cfg.get('codec') or {}
    codec = codec[-1] if isinstance(codec, list) else codec
    width, height = codec.get('input_size', (192, 256))
    return int(height), int(width)


def write_table(rows: list[dict]) -> None:
    """Writes the table of all rows between its marks in docs/deploy.md."""
    text = PAGE.read_text()
    start, end = '<!-- families -->\n', '<!-- /families -->'
    before, rest = text.split(start, 1)
    lines = []
    for zoo in ('mmdet', 'mmpose', 'torchvision'):
        chosen = [row for row in rows if row['name'].startswith(zoo)]
        counts = Counter(row['export'] for row in chosen)
        title = ', '.join(f'{counts[kind]} {kind}' for kind in ('whole', 'raw', 'not'))
        lines += [f'### {zoo}: {title}', '', '| family | | why not whole, or not at all |']
        lines.append('|---|---|---|')
        lines += [f'| {row["name"].split("/")[1]} | {row["export"]} | {why(row)} |' for row in chosen]
        lines.append('')
    PAGE.write_text(before + start + '\n'.join(lines) + end + rest.split(end, 1)[1])


def why(row: dict) -> str:
    """The reason of a row, shortened for the table."""
    if row['export'] == 'whole':
        return ''
    reason = (row['export'] == 'not' and row.get('raw_reason')) or row['reason']
    for end in (
        ': has no wrapper',
        '. There are those',
        ' the current sys.path',
        '; nothing was written',
    ):
        reason = reason.split(end)[0]
    reason = re.sub(r'\S*/(whole|raw)\.onnx\.part', 'the file', reason).replace('|', '/')
    if ' has no wrapper' in row['reason'] and row['export'] == 'raw':
        return f'no wrapper for {reason}'
    return reason[:160].rstrip(', ')


def run(name: str, config: str, how: dict, limit: int) -> dict:
    """The row of one family, which a separate process has at most ``limit`` seconds for."""
    here, there = FORK.Pipe(duplex=False)
    how = {key: value for key, value in how.items() if key == 'size'}
    process = FORK.Process(target=examine, args=(config, how, there))
    process.start()
    there.close()
    row: dict = {}
    end = time.monotonic() + limit
    try:
        while here.poll(max(0, end - time.monotonic())):
            row = here.recv()
        process.kill()
        row = row or {'export': 'not', 'reason': f'no end within {limit} s'}
    except EOFError:
        process.join()
    crashed = {'export': 'not', 'reason': 'the process crashed'}
    return {'name': name, 'config': config} | (row or crashed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['*'], help='patterns, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='number of processes')
    parser.add_argument('--limit', type=int, default=300, help='seconds for one family')
    parser.add_argument('--resume', action='store_true', help='skip families that have a row')
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = {n: f for n, f in families().items() if any(fnmatchcase(n, p) for p in args.only)}
    if not chosen:
        parser.error(f'--only {args.only}: no such family')
    if args.resume and args.out.exists():
        done = {row['name'] for row in json.loads(args.out.read_text())}
        chosen = {name: family for name, family in chosen.items() if name not in done}
    if chosen:
        warm_up()
    import mmprune.mm.deploy.export  # noqa: F401  (once, before the forks)

    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run, n, *f, args.limit) for n, f in chosen.items()]:
            row = future.result()
            print(f'{row["name"]:34s} {row["export"]:6s} {row.get("reason", "")[:140]}', flush=True)
            known = json.loads(args.out.read_text()) if args.out.exists() else []
            rows = {r['name']: r for r in known} | {row['name']: row}
            ordered = [rows[name] for name in families() if name in rows]
            args.out.write_text(json.dumps(ordered, indent=1) + '\n')
    if args.out == RESULTS:
        write_table(json.loads(RESULTS.read_text()))


if __name__ == '__main__':
    main()
