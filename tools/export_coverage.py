"""Finds out which families of the zoos can be exported: whole, as raw outputs, or not, and why.

    python tools/export_coverage.py                       # all of tools/coverage.txt, hours on one core
    python tools/export_coverage.py --only 'mmdet/*rcnn*' --jobs 2
    python tools/export_coverage.py --resume              # only families without a row

One model of each family is exported, with random weights and at a fixed size, in a separate process.
The export compares the file in ONNX Runtime with the model in PyTorch. The result of each family is
merged into docs/deploy.json at once. At the end the table in docs/deploy.md is made from that file.
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


def examine(config: str, build_options: dict, pipe) -> None:
    """Exports the model of one family, and sends its row through a pipe.

    Args:
        config: the name of the config, as :func:`tools.zoo.build` takes it.
        build_options: further arguments of ``build``.
        pipe: the end of the pipe to write to. The row has ``export`` (``'whole'``, ``'raw'`` or
            ``'not'``), the ``reason`` why it is not whole, and a ``raw_reason`` if both exports fail.
    """
    # Discards all output of the model's code.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from mmprune.errors import PruneError
    from mmprune.mm.deploy.export import export_model
    from tools.zoo import build, load

    try:
        cfg = config_of(config) or load(config)
        model, forward = build(cfg, **build_options)
        model.cfg = cfg
        side = build_options.get('size', 128)
        if cfg.get('default_scope') == 'mmdet':  # feature pyramids and attention windows need multiples
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
            # ``run`` may stop this process while it tries the next kind. It then keeps this row.
            pipe.send(row | {'export': 'not'})
    pipe.send(row)


SPREADS = {
    'conv_offset': 0.05, 'spatial_conv_offset': 0.05, 'offset_s': 0.05, 'offset_l': 0.05,
    'sampling_offsets': 0.05, 'conv2.fc2': 0.3, 'switch': 0.5, 'pre_context': 0.1, 'post_context': 0.1,
}  # fmt: skip
"""{end of a layer's name: the largest standard deviation that its outputs may have}."""


def as_trained(model, forward, size: tuple[int, int]) -> None:
    """Scales down layers whose outputs are far larger with random weights than after training.

    Without this, rounding alone changes most results of some networks, and a comparison of the file
    with PyTorch shows nothing. Examples are deformable convolutions, which sample far away in maps of
    noise; the split attention of ResNeSt, which saturates; and the global context of DetectoRS, which
    is much larger than the maps that it is added to.
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
        for suffix, spread in SPREADS.items()
        if f'.{name}'.endswith(f'.{suffix}')
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
    if queries is not None and hasattr(model.roi_head, 'mask_head'):
        # It cannot paste the mask of a box without pixels, so its boxes start large and hardly change.
        for head in model.roi_head.bbox_head:
            head.fc_reg.weight.data.mul_(0.01)
            head.fc_reg.bias.data.zero_()
        boxes = model.rpn_head.init_proposal_bboxes.weight.data
        boxes.copy_(torch.rand_like(boxes) * 0.3 + 0.3)


def config_of(config: str) -> Config | None:
    """A config of one of torchvision's classifiers; ``None`` if the name is not of torchvision.

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
    """(height, width) of the images that a pose model takes, as its codec determines."""
    codec = model.cfg.get('codec') or {}
    codec = codec[-1] if isinstance(codec, list) else codec
    width, height = codec.get('input_size', (192, 256))
    return int(height), int(width)


def write_table(rows: list[dict]) -> None:
    """Replaces the table in docs/deploy.md, between two comments, by one of all rows."""
    text = PAGE.read_text()
    start, end = '<!-- families -->\n', '<!-- /families -->'
    before, rest = text.split(start, 1)
    lines = []
    for zoo in ('mmdet', 'mmpose', 'torchvision'):
        rows_of_zoo = [row for row in rows if row['name'].startswith(zoo)]
        counts = Counter(row['export'] for row in rows_of_zoo)
        title = ', '.join(f'{counts[kind]} {kind}' for kind in ('whole', 'raw', 'not'))
        lines += [f'### {zoo}: {title}', '', '| family | | why not whole, or not at all |']
        lines.append('|---|---|---|')
        lines += [
            f'| {row["name"].split("/")[1]} | {row["export"]} | {why(row)} |' for row in rows_of_zoo
        ]
        lines.append('')
    PAGE.write_text(before + start + '\n'.join(lines) + end + rest.split(end, 1)[1])


def why(row: dict) -> str:
    """The reason why a family is not exported whole, or not at all, shortened for the table."""
    if row['export'] == 'whole':
        return ''
    reason = (row['export'] == 'not' and row.get('raw_reason')) or row['reason']
    for tail in (
        ': has no wrapper',
        '. There are those',
        ' the current sys.path',
        '; nothing was written',
    ):
        reason = reason.split(tail)[0]
    reason = re.sub(r'\S*/(whole|raw)\.onnx\.part', 'the file', reason).replace('|', '/')
    if ' has no wrapper' in row['reason'] and row['export'] == 'raw':
        return f'no wrapper for {reason}'
    return reason[:160].rstrip(', ')


def run(name: str, config: str, build_options: dict, limit: int) -> dict:
    """The row of one family, which :func:`examine` makes in a separate process. The process is killed
    after ``limit`` seconds; the last row that it sent counts."""
    receiver, sender = FORK.Pipe(duplex=False)
    build_options = {key: value for key, value in build_options.items() if key == 'size'}
    process = FORK.Process(target=examine, args=(config, build_options, sender))
    process.start()
    sender.close()
    row: dict = {}
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            row = receiver.recv()
        process.kill()
        row = row or {'export': 'not', 'reason': f'no end within {limit} s'}
    except EOFError:  # the process has ended
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
    chosen = {
        name: family
        for name, family in families().items()
        if any(fnmatchcase(name, pattern) for pattern in args.only)
    }
    if not chosen:
        parser.error(f'--only {args.only}: no such family')
    if args.resume and args.out.exists():
        done = {row['name'] for row in json.loads(args.out.read_text())}
        chosen = {name: family for name, family in chosen.items() if name not in done}
    if chosen:
        warm_up()
    import mmprune.mm.deploy.export  # noqa: F401  (once, before the forks)

    with ThreadPoolExecutor(args.jobs) as pool:
        pending = [pool.submit(run, name, *family, args.limit) for name, family in chosen.items()]
        for future in pending:
            row = future.result()
            print(f'{row["name"]:34s} {row["export"]:6s} {row.get("reason", "")[:140]}', flush=True)
            earlier = json.loads(args.out.read_text()) if args.out.exists() else []
            rows = {r['name']: r for r in earlier} | {row['name']: row}
            ordered = [rows[name] for name in families() if name in rows]
            args.out.write_text(json.dumps(ordered, indent=1) + '\n')
    if args.out == RESULTS:
        write_table(json.loads(RESULTS.read_text()))


if __name__ == '__main__':
    main()
