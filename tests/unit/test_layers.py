"""What may import what: the core runs with torch alone, and data runs one way through its layers."""

import ast
import subprocess
import sys
from pathlib import Path

import mmprune

PACKAGE = Path(mmprune.__file__).parent

LAYERS = [
    {'errors', '_version'},
    {'compat', 'nested', 'onnx_sessions', 'progress'},
    {'contexts', 'registration'},
    {'copies'},
    {'graph'},
    {'surgery'},
    {'distributed'},
    {'budget'},
    {'score', 'check', 'compensation'},
    {'session', 'defaults'},
    {'api', 'recalibration'},
    {'pruner'},
    {'analysis'},
    {'mm'},
]
"""From the lowest up. A layer imports itself and what is below it, never what is beside it."""

OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmpose'}
CORE_NEEDS = {'torch', 'numpy', 'scipy', 'rich'}
OPTIONAL = {'onnx', 'onnxruntime', 'openvino'}
"""Imported inside functions that say what to install."""


def modules():
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        yield '.'.join(('mmprune', *(parts[:-1] if parts[-1] == '__init__' else parts))), path


def imports_of(name, path):
    """Dotted names of what a file imports, anywhere in it."""
    known = {module for module, _ in modules()}
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package.split('.')[: 1 - node.level or None]) if node.level else ''
            source = '.'.join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f'{source}.{alias.name}'
                yield inner if inner in known else source


def layer_of(name):
    room = name.split('.')[1]
    found = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f'{room} has no place in LAYERS: give it one'
    return found[0], room


def test_no_module_imports_from_a_higher_layer():
    wrong = []
    for name, path in modules():
        if name == 'mmprune':
            continue
        (level, room) = layer_of(name)
        for target in imports_of(name, path):
            if not target.startswith('mmprune.'):
                assert target != 'mmprune' or room == 'mm', f'{name}: imports the whole package'
                continue
            other, other_room = layer_of(target)
            if other > level or other == level and other_room != room:
                wrong.append(f'{name} -> {target}')
    assert not wrong


def test_nothing_below_mm_imports_openmmlab():
    wrong = []
    for name, path in modules():
        if name.startswith('mmprune.mm'):
            continue
        for target in imports_of(name, path):
            root = target.split('.')[0]
            if root in OPENMMLAB or root not in (
                sys.stdlib_module_names | CORE_NEEDS | OPTIONAL | {'mmprune'}
            ):
                wrong.append(f'{name} -> {target}')
    assert not wrong


def test_there_is_no_circle():
    graph = {name: set(imports_of(name, path)) for name, path in modules() if name != 'mmprune'}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(' -> '.join([*path[path.index(name) :], name]))
        if name in done or name not in graph:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_no_import_is_for_type_checkers_alone():
    assert not [name for name, path in modules() if 'TYPE_CHECKING' in path.read_text()]


CORE_ALONE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split('.')[0] in {blocked} else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from torch import nn
import mmprune

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).relu())

model, fresh, x = Net(), Net(), torch.randn(2, 3, 8, 8)
plan = mmprune.prune(model, lambda m: m(x), keep_flops=0.5, divisor=1)
assert model.stem.out_channels < 16
mmprune.load_model_def(fresh, mmprune.save_model_def(model)).load_state_dict(model.state_dict())
assert torch.equal(fresh.eval()(x), model.eval()(x))
mmprune.recalibrate(model, lambda m, batch: m(batch), [x])
mmprune.fuse(model)
try:
    mmprune.load_pruned('a config', 'a checkpoint')
except mmprune.PruneError as error:
    assert 'mmprune[mm]' in str(error), error
else:
    raise AssertionError('load_pruned ran without OpenMMLab')
print('the core runs alone')
"""


def test_the_core_runs_with_torch_numpy_scipy_and_rich_alone(tmp_path):
    installed = {'mmengine', 'mmcv', 'mmdet', 'mmpose', 'torchvision', 'cv2', 'onnx', 'onnxruntime'}
    installed |= {'openvino', 'pycocotools', 'matplotlib', 'PIL', 'sklearn', 'skimage', 'pandas'}
    script = tmp_path / 'alone.py'
    script.write_text(CORE_ALONE.format(blocked=sorted(installed)))
    done = subprocess.run(
        [sys.executable, script],
        env={'PYTHONPATH': str(PACKAGE.parent), 'PATH': '', 'MMPRUNE_CACHE': str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'the core runs alone\n'
