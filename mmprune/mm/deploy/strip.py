"""A checkpoint without what only training needs: optimizer, EMA copy, log, scores."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmprune.errors import PruneError
from mmprune.mm.atomic_files import replace_file
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.deploy.export import load
from mmprune.surgery.meta import META, weights_in


def strip(config: str | Path | Config, checkpoint: str | Path, out: str | Path) -> Path:
    """Writes the weights of a checkpoint with its plan and the names of its classes or keypoints.

    The new file loads wherever the checkpoint does, but no training can be resumed from it.

    Args:
        config: the *unpruned* config that the checkpoint was trained with.
        checkpoint: a checkpoint file, pruned or not.
        out: the file to write; it must not exist.

    Returns:
        ``out`` as a path.

    Raises:
        PruneError: ``out`` exists or its folder does not, or the checkpoint does not fit the config.
    """
    out = Path(out)
    if out.exists():
        raise PruneError(f'{out}: exists; remove it, or give another --out')
    if not out.parent.is_dir():
        raise PruneError(f'{out}: there is no folder {out.parent}; make it first')
    load(config if isinstance(config, Config) else Config.fromfile(config), checkpoint)
    content = read_checkpoint(checkpoint)
    meta = content.get('meta') or {}
    new = {
        'state_dict': compact(weights_in(content, checkpoint)),
        'meta': {key: meta[key] for key in (META, 'dataset_meta') if key in meta},
    }
    buffer = io.BytesIO()
    torch.save(new, buffer)
    return replace_file(out, buffer.getvalue())


def compact(state: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict whose tensors bring no memory along that is not theirs: ``torch.save`` writes all of
    the memory that a slice was taken from."""
    own = OrderedDict(
        (name, tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor)
        for name, tensor in state.items()
    )
    own._metadata = getattr(state, '_metadata', OrderedDict())  # the versions of the modules
    return own
