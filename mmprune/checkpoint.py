"""The record in a checkpoint: reading it, and rebuilding the pruned model from its unpruned config."""

import contextlib
import copy
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from mmprune.compat import allow_mmengine_checkpoints
from mmprune.errors import PruneError
from mmprune.fusing import fuse as fold_norms
from mmprune.plan import Plan, names_by_first, plan_of

META = 'mmprune'
"""The key of the record in a checkpoint's ``meta``."""


def read_checkpoint(path: str | Path, device: str = 'cpu') -> dict[str, Any]:
    """A checkpoint's content. Never runs code: ``torch.load``'s ``weights_only`` is on, whatever
    mmengine's own loader or the environment would say.

    ``path``: a file, or an address that mmengine fetches (``https://...``).

    Raises:
        PruneError: no such file; torn or not a checkpoint; or it holds objects beyond tensors and
            what mmengine itself writes.
    """
    path = str(path)
    local = '://' not in path
    if local and not Path(path).is_file():
        raise PruneError(f'{path}: no such checkpoint file')
    try:
        # Again: torch's context manager `safe_globals` forgets at its end what was known before it.
        allow_mmengine_checkpoints()
        if local:
            check_archive(path)
            checkpoint = torch.load(path, map_location=device, weights_only=True)
        else:
            with weights_only_everywhere():
                checkpoint = _load_checkpoint(path, map_location=device)
    except PruneError:
        raise
    except pickle.UnpicklingError as error:
        raise PruneError(
            f'{path}: refused: it is no checkpoint, or holds objects that could run code '
            f'({first_line(error)})'
        ) from error
    except Exception as error:  # a damaged file can bring a reader to any error
        raise PruneError(
            f'{path}: torn or not a checkpoint ({type(error).__name__}: {first_line(error)}); take '
            'an earlier one'
        ) from error
    if not isinstance(checkpoint, dict):
        raise PruneError(f'{path}: holds a {type(checkpoint).__name__}, not a checkpoint dict')
    return checkpoint


@contextlib.contextmanager
def weights_only_everywhere() -> Iterator[None]:
    """Has every ``torch.load`` refuse what could run code, one with ``weights_only=False`` too."""
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = '1'
    try:
        yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


FORCE, FORCE_NOT = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
"""torch's own variables. The second counts where a caller says nothing, as mmengine does."""


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
        damaged = archive.testzip()
    if damaged is not None:
        raise PruneError(f'{path}: damaged: {damaged} differs from its checksum; take an earlier one')


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ''


def plan_in(checkpoint: dict[str, Any]) -> Plan | None:
    """The plan in a checkpoint's meta; ``None`` where it was never pruned."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or META not in meta:
        return None
    return Plan.from_meta(meta[META])


def plan_from(path: str | Path) -> Plan:
    """The plan in a checkpoint file.

    Raises:
        PruneError: also where the checkpoint has none.
    """
    plan = plan_in(read_checkpoint(path))
    if plan is None:
        raise PruneError(
            f"{path}: has no plan (meta['{META}']): it is a checkpoint of an unpruned model; load it "
            'without mmprune'
        )
    return plan


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


def load_pruned(
    config: str | Path | Config, checkpoint: str | Path, device: str = 'cpu', fuse: bool = False
) -> nn.Module:
    """The pruned model, ready for inference, from its *unpruned* config and its checkpoint.

    It has ``.cfg`` and ``.dataset_meta``, as ``mmdet.apis.inference_detector`` and mmpose's
    ``inference_topdown`` want them. ``fuse``: fold batch norms into convolutions
    (:func:`mmprune.fuse`); it is faster, and its weights no longer fit a checkpoint.

    Raises:
        PruneError: the checkpoint has no plan, is damaged, or belongs to another architecture.
    """
    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    content = read_checkpoint(checkpoint)
    plan = plan_in(content)
    if plan is None:
        raise PruneError(f"{checkpoint}: has no plan (meta['{META}']): it is of an unpruned model")
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
    """A copy of a model's config in which nothing is fetched: the weights come from elsewhere."""
    if isinstance(model_cfg, dict):
        return type(model_cfg)(
            (key, None if _fetches(key, value) else without_pretrained(value))
            for key, value in model_cfg.items()
        )
    if isinstance(model_cfg, list | tuple):
        return type(model_cfg)(without_pretrained(value) for value in model_cfg)
    return model_cfg


def _fetches(key: str, value: Any) -> bool:
    pretrained = isinstance(value, dict) and value.get('type') == 'Pretrained'
    return (key == 'init_cfg' and pretrained) or (key == 'pretrained' and isinstance(value, str))


def ensure_hook(cfg: Config) -> None:
    """Adds a ``PruneHook`` to a config that has none, so that a pruned checkpoint is rebuilt."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == 'PruneHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='PruneHook', rebuild_only=True)]
