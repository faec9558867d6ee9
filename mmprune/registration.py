"""Imports ``mmprune.mm`` as soon as both mmprune and mmengine are imported, in whichever order.

``mmprune.mm`` registers the hooks, and has mmengine rebuild the pruned structure when it loads a pruned
checkpoint. Without it mmengine would skip the weights of such a checkpoint and only print their names.
But OpenMMLab takes seconds to import, so ``import mmprune`` must not import it. If mmengine is not
imported yet, a finder in ``sys.meta_path`` waits for its import.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mmprune.compat import declare_torchvision_schemas


class _AfterMmengine(MetaPathFinder):
    """An import hook that imports ``mmprune.mm`` right after mmengine, and then removes itself.

    It also makes torchvision importable before it is imported for the first time
    (:func:`mmprune.compat.declare_torchvision_schemas`). mmengine imports torchvision.
    """

    def __init__(self) -> None:
        self._saw_torchvision = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname in ('torchvision', 'mmengine') and not self._saw_torchvision:
            self._saw_torchvision = True  # before the call, which looks for torchvision itself
            declare_torchvision_schemas()
        if fullname != 'mmengine':
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            import_module('mmprune.mm')

        spec.loader.exec_module = execute_both
        return spec


def register_with_mmengine() -> None:
    """Imports ``mmprune.mm`` now if mmengine is imported, and otherwise after mmengine's import."""
    if sys.modules.get('mmengine') is not None:
        import_module('mmprune.mm')
    else:
        sys.meta_path.insert(0, _AfterMmengine())
