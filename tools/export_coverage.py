"""Which families of the zoos can be exported: whole, as raw outputs, or not, and why.

    python tools/export_coverage.py                       # all of tools/coverage.txt, hours on one core
    python tools/export_coverage.py --only 'mmdet/*rcnn*' --jobs 2
    python tools/export_coverage.py --resume              # only families without a row

One model of each family, random weights, a fixed size, each in a process of its own; the file is
compared with PyTorch in ONNX Runtime. Results are merged into docs/deploy.json after each family, and
the table in docs/deploy.md is written from that.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from coverage import ROOT, families, warm_up  # noqa: E402

RESULTS = ROOT / 'docs' / 'deploy.json'
PAGE = ROOT / 'docs' / 'deploy.md'
FORK = multiprocessing.get_context('fork')


def examine(config: str, how: dict, pipe) -> None:
    """Sends the row of one family: ``export`` (whole, raw, not), and ``reason`` where not whole."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from mmprune.errors import PruneError
    from mmprune.mm.deploy.export import export_model
    from mmprune.mm.zoo import build, load

    try:
        model, _ = build(config, **how)
        model.cfg = load(config)
        with_small_offsets(model)
    except Exception as error:  # a fault of the zoo, whatever it is
        told = f'does not build: {error}'.splitlines()[0][:200]
        return pipe.send({'export': 'not', 'reason': told})
    row: dict = {'reason': ''}
    side = -(-how.get('size', 128) // 64) * 64
    with tempfile.TemporaryDirectory() as folder:
        for kind in ('whole', 'raw'):
            out, raw = Path(folder) / f'{kind}.onnx', kind == 'raw'
            pose = model.cfg.get('default_scope') == 'mmpose'
            try:
                size = fixed_side(model) if pose else (side, side)
                export_model(model, out, raw=raw, size=size)
                row['export'] = kind
                break
            except PruneError as error:
                told = str(error)
            except Exception as error:  # of a model's own code
                told = f'{type(error).__name__}: {error}'
            row['export'] = 'not'
            row['raw_reason' if raw else 'reason'] = (told.splitlines() or [''])[0][:300]
            pipe.send(row | {'export': 'not'})
    pipe.send(row)


def with_small_offsets(model) -> None:
    """Deformable convolutions sample near their place again, as trained ones do: where they jump over
    maps, PyTorch in single precision is no nearer to itself in double than any other number."""
    for name, layer in model.named_modules():
        if name.rsplit('.', 1)[-1] in ('conv_offset', 'spatial_conv_offset', 'sampling_offsets'):
            for parameter in layer.parameters():
                parameter.data.mul_(0.02)


def fixed_side(model) -> tuple[int, int] | None:
    """(height, width) that a pose model's codec fixes."""
    codec = model.cfg.get('codec') or {}
    codec = codec[-1] if isinstance(codec, list) else codec
    width, height = codec.get('input_size', (192, 256))
    return int(height), int(width)


def write_table(rows: list[dict]) -> None:
    """Puts the table of all rows between its marks in docs/deploy.md."""
    text = PAGE.read_text()
    start, end = '<!-- families -->\n', '<!-- /families -->'
    before, rest = text.split(start, 1)
    lines = []
    for zoo in ('mmdet', 'mmpose'):
        own = [row for row in rows if row['name'].startswith(zoo)]
        counts = Counter(row['export'] for row in own)
        told = ', '.join(f'{counts[kind]} {kind}' for kind in ('whole', 'raw', 'not'))
        lines += [f'### {zoo}: {told}', '', '| family | | why not whole, or not at all |']
        lines.append('|---|---|---|')
        lines += [f'| {row["name"].split("/")[1]} | {row["export"]} | {why(row)} |' for row in own]
        lines.append('')
    PAGE.write_text(before + start + '\n'.join(lines) + end + rest.split(end, 1)[1])


def why(row: dict) -> str:
    """The reason of a row, as short as it says all."""
    if row['export'] == 'whole':
        return ''
    told = row.get('raw_reason') if row['export'] == 'not' else None
    told = (told or row['reason']).split(': has no wrapper')[0].split('. There are those')[0]
    told = told.split(' the current sys.path')[0].split('; nothing was written')[0]
    told = re.sub(r'\S*/(whole|raw)\.onnx\.part', 'the file', told).replace('|', '/')
    if ' has no wrapper' in row['reason'] and row['export'] == 'raw':
        return f'no wrapper for {told}'
    return told[:160].rstrip(', ') + (' (an older run)' if row.get('older') else '')


def run(name: str, config: str, how: dict, limit: int) -> dict:
    here, there = FORK.Pipe(duplex=False)
    how = {key: value for key, value in how.items() if key == 'size'}
    process = FORK.Process(target=examine, args=(config, how, there))
    process.start()
    there.close()
    row, end = {'export': 'not', 'reason': 'the process crashed'}, time.monotonic() + limit
    try:
        while here.poll(max(0, end - time.monotonic())):
            row = here.recv()
        process.kill()
        row.setdefault('reason', f'no end within {limit} s')
    except EOFError:
        process.join()
    return {'name': name, 'config': config} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--only', nargs='+', default=['mm*'], help='patterns, e.g. mmdet/*detr*')
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--limit', type=int, default=300, help='seconds for one family')
    parser.add_argument('--resume', action='store_true', help='leave families with a row alone')
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
