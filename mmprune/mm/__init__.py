"""mmprune for OpenMMLab: hooks, wrappers, checkpoints, export.

Importing this package registers the hooks and wrappers that configs name, lets mmengine rebuild the
pruned structure whenever it loads a pruned checkpoint, and sends the log of the core to mmengine. It is
imported as soon as both mmprune and mmengine are imported (``mmprune.registration``).
"""

from typing import Any

from mmprune.compat import declare_torchvision_schemas

declare_torchvision_schemas()  # before the imports below, some of which import torchvision

from mmprune.mm import compat, loading, logs, wrappers  # noqa: E402, F401  (wrappers register themselves)
from mmprune.mm.checkpoint import load_pruned, plan_from  # noqa: E402
from mmprune.mm.deploy.onnx_file import OnnxFile, open_model  # noqa: E402
from mmprune.mm.hooks import (  # noqa: E402
    AtomicCheckpointHook,
    DistillHook,
    PruneHook,
    RebuildHook,
)

compat.allow_mmengine_checkpoints()
loading.install()
logs.send_to_mmengine()

__all__ = [
    'AtomicCheckpointHook',
    'DistillHook',
    'OnnxFile',
    'PruneHook',
    'RebuildHook',
    'export',
    'load_pruned',
    'open_model',
    'plan_from',
]


def __getattr__(name: str) -> Any:
    if name == 'export':  # imported on first use, because it needs mmdet
        from mmprune.mm.deploy.export import export

        return export
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
