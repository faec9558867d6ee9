"""Reads checkpoint files without running code: their content, their plan and their weights."""

import copy
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmprune import compat
from mmprune.errors import PruneError
from mmprune.surgery.plan import Plan, plan_of
from mmprune.surgery.structure import names_by_first

META = 'mmprune'
"""The key of a plan's record in a checkpoint's ``meta``."""

SAFE_TYPES: list[Any] = []
"""Types beside tensors and plain data that checkpoint files may hold. :mod:`mmprune.mm` adds the types
that mmengine writes."""


def read_file(path: str | Path, device: str = 'cpu') -> dict[str, Any]:
    """Reads the content of a checkpoint file. No code in the file is run: ``torch.load`` is called with
    ``weights_only=True``, whatever the environment says.

    Raises:
        PruneError: the file does not exist, is truncated or corrupt, is no checkpoint, or holds objects
            other than tensors, plain data and ``SAFE_TYPES``.
    """
    if not Path(path).is_file():
        raise PruneError(f'{path}: no such checkpoint file')

    def load() -> Any:
        check_archive(path)
        return compat.load_weights_only(path, device, SAFE_TYPES)

    return checked_content(path, load)


def checked_content(path: str | Path, load: Callable[[], Any]) -> dict[str, Any]:
    """Calls ``load()`` and returns the dict that it gives.

    Raises:
        PruneError: ``load()`` fails, or returns no dict. The message names ``path``.
    """
    try:
        checkpoint = load()
    except PruneError:
        raise
    except pickle.UnpicklingError as error:
        raise PruneError(
            f'{path}: refused: it is not a checkpoint, or holds objects that could run code '
            f'({first_line(error)})'
        ) from error
    except Exception as error:  # a corrupt file can raise any error
        raise PruneError(
            f'{path}: truncated or corrupt, or not a checkpoint ({type(error).__name__}: '
            f'{first_line(error)}); take an earlier one'
        ) from error
    if not isinstance(checkpoint, dict):
        raise PruneError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint dict')
    return checkpoint


def check_archive(path: str | Path) -> None:
    """Compares every part of a checkpoint with the checksum that ``torch.save`` wrote beside it, which
    ``torch.load`` does not do. Files that torch wrote before version 1.6 are no archives and pass.

    Raises:
        PruneError: a part differs from its checksum, or would unpack to more than the file's length.
    """
    size = Path(path).stat().st_size
    with open(path, 'rb') as file:
        if file.read(2) != b'PK':
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed or sum(member.file_size for member in members) > size:
            raise PruneError(
                f'{path}: refused: it claims to hold more than its {size:,} bytes, but torch.save '
                'never compresses'
            )
        corrupt = archive.testzip()
    if corrupt is not None:
        raise PruneError(
            f'{path}: truncated or corrupt: {corrupt} differs from its checksum; take an earlier one'
        )


def first_line(error: BaseException) -> str:
    """Returns at most 200 characters of the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ''


def plan_in(checkpoint: dict[str, Any]) -> Plan | None:
    """Reads the plan in a checkpoint's ``meta``. Returns ``None`` if it holds no plan, as for an
    unpruned model."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or META not in meta:
        return None
    return Plan.from_meta(meta[META])


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Loads the weights strictly: model and checkpoint must hold the same tensors. A tensor may have
    another name in the checkpoint if the model's plan knows both names.

    Raises:
        PruneError: the tensors differ in name or shape. The message names ``path``.
    """
    state = copy.copy(weights_in(checkpoint, path))  # `dict(...)` would lose the modules' versions
    plan, expected = plan_of(model), set(model.state_dict())
    for names in names_by_first(plan.aliases if plan is not None else {}).values():
        # Sorted so that a name which the model expects, if there is one, comes last.
        present = sorted((name for name in names if name in state), key=expected.__contains__)
        for name in names if present else ():
            if name in expected:
                state.setdefault(name, state[present[-1]])
            elif name in state and torch.equal(state[name], state[present[-1]]):
                del state[name]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise PruneError(f'{path}: weights do not fit the model: {error}') from error


def weights_in(checkpoint: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the ``state_dict`` of a checkpoint, or the checkpoint itself if it is a state dict.

    Raises:
        PruneError: it holds something other than tensors. The message names ``path``.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        raise PruneError(f"{path}: its 'state_dict' is a {type(state).__name__}, not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise PruneError(
                f'{path}: weights do not fit the model: {str(name)[:80]} is a '
                f'{type(tensor).__name__}, not a tensor'
            )
    return state
