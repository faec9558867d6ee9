"""The record in a checkpoint: reading a file without running code, its plan, its weights."""

import copy
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.surgery.plan import Plan, names_by_first, plan_of

META = 'mmprune'
"""The key of the record in a checkpoint's ``meta``."""

SAFE_TYPES: list[Any] = []
"""Types beside tensors and plain data that checkpoint files may hold; :mod:`mmprune.mm` adds those that
mmengine writes."""


def read_file(path: str | Path, device: str = 'cpu') -> dict[str, Any]:
    """The content of a checkpoint file. Never runs code: ``torch.load``'s ``weights_only`` is on,
    whatever the environment would say.

    Raises:
        PruneError: no such file; truncated or corrupt, or not a checkpoint; or it holds objects beyond
            tensors, plain data and ``SAFE_TYPES``.
    """
    if not Path(path).is_file():
        raise PruneError(f'{path}: no such checkpoint file')

    def load() -> Any:
        check_archive(path)
        # Each time: torch's context manager `safe_globals` forgets at its end what was known before it.
        torch.serialization.add_safe_globals(SAFE_TYPES)
        return torch.load(path, map_location=device, weights_only=True)

    return checked_content(path, load)


def checked_content(path: str | Path, load: Callable[[], Any]) -> dict[str, Any]:
    """What ``load()`` gives, if it is a dict; any error of it as a PruneError that names ``path``."""
    try:
        checkpoint = load()
    except PruneError:
        raise
    except pickle.UnpicklingError as error:
        raise PruneError(
            f'{path}: refused: it is not a checkpoint, or holds objects that could run code '
            f'({first_line(error)})'
        ) from error
    except Exception as error:  # a corrupt file can bring a reader to any error
        raise PruneError(
            f'{path}: truncated or corrupt, or not a checkpoint ({type(error).__name__}: '
            f'{first_line(error)}); take an earlier one'
        ) from error
    if not isinstance(checkpoint, dict):
        raise PruneError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint dict')
    return checkpoint


def check_archive(path: str | Path) -> None:
    """Compares every part of a checkpoint with the checksum that ``torch.save`` wrote beside it;
    ``torch.load`` does not. Files of torch before 1.6 are no archives, and have none.

    Raises:
        PruneError: a part differs, or would take more memory than the file is long.
    """
    size = Path(path).stat().st_size
    with open(path, 'rb') as file:
        if file.read(2) != b'PK':
            return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
        if packed or sum(part.file_size for part in parts) > size:
            raise PruneError(
                f'{path}: refused: it claims to hold more than its {size:,} bytes; torch.save packs '
                'nothing'
            )
        corrupt = archive.testzip()
    if corrupt is not None:
        raise PruneError(
            f'{path}: truncated or corrupt: {corrupt} differs from its checksum; take an earlier one'
        )


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ''


def plan_in(checkpoint: dict[str, Any]) -> Plan | None:
    """The plan in a checkpoint's meta; ``None`` where it was never pruned."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or META not in meta:
        return None
    return Plan.from_meta(meta[META])


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Strictly: every tensor of the model comes from the checkpoint, and none is left over but under
    another name that its plan knows."""
    state = copy.copy(weights_in(checkpoint, path))  # not as a dict: modules' versions hang on it
    plan, own = plan_of(model), set(model.state_dict())
    for names in names_by_first(plan.aliases if plan is not None else {}).values():
        found = sorted((name for name in names if name in state), key=own.__contains__)
        for name in names if found else ():
            if name in own:
                state.setdefault(name, state[found[-1]])
            elif name in state and torch.equal(state[name], state[found[-1]]):
                del state[name]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise PruneError(f'{path}: weights do not fit the model: {error}') from error


def weights_in(checkpoint: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The ``state_dict`` of a checkpoint, or a checkpoint that is one itself.

    Raises:
        PruneError: it holds something else than tensors.
    """
    state = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state, dict):
        raise PruneError(f"{path}: its 'state_dict' is a {type(state).__name__}, not a dict of tensors")
    odd = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if odd:
        raise PruneError(
            f'{path}: weights do not fit the model: {str(odd[0])[:80]} is a '
            f'{type(state[odd[0]]).__name__}, not a tensor'
        )
    return state
