"""Reads checkpoints of mmengine, and rebuilds a pruned model from its unpruned config."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import get_local_path
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from mmprune import compat
from mmprune.errors import PruneError
from mmprune.surgery.fusion import fuse as fold_norms
from mmprune.surgery.meta import (
    META,
    SAFE_TYPES,
    checked_content,
    load_weights,
    plan_in,
    read_file,
)
from mmprune.surgery.plan import Plan


def read_checkpoint(path: str | Path, device: str = 'cpu') -> dict[str, Any]:
    """Reads the content of a checkpoint. Code in it is never run, not even by mmengine's loaders.

    Args:
        path: the path of a file, or a URL that mmengine fetches (``https://...``).
        device: the device to which tensors are loaded.

    Raises:
        PruneError: see :func:`mmprune.surgery.meta.read_file`.
    """
    path = str(path)
    if '://' not in path:
        return read_file(path, device)

    def load() -> Any:
        if not compat.HAS_SAFE_GLOBALS and path.startswith(('http://', 'https://')):
            with get_local_path(path) as downloaded:
                return read_file(downloaded, device)
        compat.add_safe_globals(SAFE_TYPES)
        with weights_only_everywhere():
            return _load_checkpoint(path, map_location=device)

    return checked_content(path, load)


@contextlib.contextmanager
def weights_only_everywhere() -> Iterator[None]:
    """Makes each ``torch.load`` inside the block refuse objects that could run code, even with
    ``weights_only=False``."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = '1'
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


FORCE, FORCE_NOT = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
"""Environment variables that set ``weights_only`` of ``torch.load``. ``FORCE_NOT`` applies to callers
that do not pass ``weights_only``, such as mmengine, so it has to be unset."""


def plan_from(path: str | Path) -> Plan:
    """Reads the plan in a checkpoint.

    Args:
        path: the path of a file, or a URL that mmengine fetches.

    Raises:
        PruneError: the checkpoint has no plan, or can't be read.
    """
    return _plan_from_content(read_checkpoint(path), path)


def _plan_from_content(content: dict[str, Any], path: str | Path) -> Plan:
    plan = plan_in(content)
    if plan is None:
        raise PruneError(
            f"{path}: has no plan (meta['{META}']): it is a checkpoint of an unpruned model; load it "
            'without mmprune'
        )
    return plan


def load_pruned(
    config: str | Path | Config, checkpoint: str | Path, device: str = 'cpu', fuse: bool = False
) -> nn.Module:
    """Builds a pruned model for inference from its *unpruned* config and its checkpoint.

    The model has the attributes ``cfg`` and ``dataset_meta`` that ``mmdet.apis.inference_detector`` and
    mmpose's ``inference_topdown`` need.

    Args:
        config: the path of a config, or a ``Config`` of mmengine.
        checkpoint: the path of a checkpoint, or a URL that mmengine fetches.
        device: the device to which the model is moved.
        fuse: whether to fold batch norms into convolutions (:func:`mmprune.fuse`). A fused model is
            faster, but its weights no longer fit the checkpoint.

    Returns:
        The model in evaluation mode.

    Raises:
        PruneError: the checkpoint has no plan, is damaged, or belongs to another architecture.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    content = read_checkpoint(checkpoint)
    plan = _plan_from_content(content, checkpoint)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model = MODELS.build(without_pretrained(cfg.model))
    plan.apply(model)
    load_weights(model, content, checkpoint)
    model.cfg = cfg
    meta = content['meta'].get('dataset_meta') or {}
    model.dataset_meta = {str(key).lower(): value for key, value in meta.items()}
    if fuse:
        fold_norms(model)
    return model.to(device).eval()


def without_pretrained(model_cfg: Any) -> Any:
    """Copies a model's config without its pretrained weights, for a model that gets other weights.
    Dicts and lists keep their types, such as mmengine's ``ConfigDict``."""
    if isinstance(model_cfg, dict):
        return type(model_cfg)(
            (key, None if _fetches(key, value) else without_pretrained(value))
            for key, value in model_cfg.items()
        )
    if isinstance(model_cfg, list | tuple):
        return type(model_cfg)(without_pretrained(value) for value in model_cfg)
    return model_cfg


def _fetches(key: str, value: Any) -> bool:
    """Whether an entry of a config makes the model load pretrained weights."""
    pretrained = isinstance(value, dict) and value.get('type') == 'Pretrained'
    return (key == 'init_cfg' and pretrained) or (key == 'pretrained' and isinstance(value, str))


def ensure_hook(cfg: Config) -> None:
    """Adds a ``RebuildHook`` to a config that has no hook that rebuilds pruned checkpoints."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') in ('PruneHook', 'RebuildHook') for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='RebuildHook')]
