"""What needs OpenMMLab around it: so far the way out of PyTorch."""

from typing import Any

__all__ = ['export']


def __getattr__(name: str) -> Any:
    # Late, because it takes mmdet along.
    if name == 'export':
        from mmprune.mm.deploy.export import export

        return export
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
