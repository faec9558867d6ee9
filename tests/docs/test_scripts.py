"""What scripts import from mmprune is there, also inside of functions, which no test may come to."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = 'benchmarks', 'examples', 'tools'
SCRIPTS = [file for folder in FOLDERS for file in (ROOT / folder).glob('*.py')]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_imported_name_is_there(script):
    for node in ast.walk(ast.parse(script.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if names and node.module.split('.')[0] in ('mmprune', 'tests', 'benchmarks', 'tools'):
            module = importlib.import_module(node.module)
            for name in names:
                if not hasattr(module, name):
                    importlib.import_module(f'{node.module}.{name}')
