"""OpenMMLab: hooks, wrappers, checkpoints, tools, export. Importing it registers what configs name."""

from typing import Any

from mmprune.mm import compat  # noqa: F401  (torchvision can be imported from here on)

# isort: split
from mmprune.mm import hooks, loading, logs, wrappers  # noqa: F401  (they register themselves)
from mmprune.mm.checkpoint import load_pruned, plan_from

__all__ = ['export', 'load_pruned', 'plan_from']


loading.install()


def __getattr__(name: str) -> Any:
    # Late, because it takes mmdet along.
    if name == 'export':
        from mmprune.mm.deploy.export import export

        return export
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
