"""What a config of mmengine, mmdet or mmpose says of its data sets, test pipeline and prune hook."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmprune.budget.budget import Budget

SIZE_KEYS = ('scale', 'size', 'img_scale', 'input_size', 'crop_size')
"""Options by which the transforms of OpenMMLab name a size of images, as (width, height)."""


def dataset_with_pipeline(dataset: Any) -> Any:
    """Follows wrappers such as ``RepeatDataset`` inwards to the data set that has a pipeline.

    Args:
        dataset: the config of a data set, with or without wrappers around it.

    Returns:
        The first config on the way in that has a ``pipeline``; the innermost one if none has.
    """
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return dataset


def test_steps(cfg: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The transforms of the test pipeline, or else of the validation pipeline; empty without both."""
    loader = (cfg or {}).get('test_dataloader') or (cfg or {}).get('val_dataloader') or {}
    return list(dataset_with_pipeline(loader.get('dataset') or {}).get('pipeline') or ())


def type_name(entry: Any) -> str:
    """The class name of a config entry or of an object, without its scope: ``Resize`` for
    ``dict(type='mmdet.Resize')``."""
    kind = entry.get('type') if isinstance(entry, Mapping) else type(entry)
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))).rpartition('.')[2]


def image_size(cfg: Mapping[str, Any] | None, only_fixed: bool = False) -> tuple[int, int] | None:
    """The size of the images that a config tests at.

    A pipeline either gives all images one size, or keeps their ratio within some limits, such as
    ``Resize(scale=(1333, 800), keep_ratio=True)``. In the second case, the size is that of a picture
    that fills the limits, here 800 x 1333.

    Args:
        cfg: a config. ``None`` counts as a config without a pipeline.
        only_fixed: return a size only if every image leaves the pipeline with it.

    Returns:
        (height, width) in pixels; ``None`` if no transform of the test pipeline sets a size.
    """
    size, is_fixed = None, False
    for step in test_steps(cfg):
        kind = type_name(step)
        named = [pair for key in SIZE_KEYS if (pair := _height_width(step.get(key)))]
        if named:
            is_fixed = kind in ('Pad', 'LoadCrop') or (kind == 'Resize' and not step.get('keep_ratio'))
            size = named[-1]
        elif kind == 'Resize':  # by a factor
            size, is_fixed = None, False
        elif kind == 'Pad' and step.get('pad_to_square') and size is not None:
            # A ratio that is kept within a square makes the longer side the side of the square.
            is_fixed = is_fixed or size[0] == size[1]
            size = (max(size), max(size))
    return size if is_fixed or not only_fixed else None


def _height_width(value: Any) -> tuple[int, int] | None:
    """(height, width) from a side of a square or OpenMMLab's (width, height); ``None`` for the rest."""
    sides = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if is_pair and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[1], sides[0]
    return None


def prune_hook_options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the config's ``PruneHook``; empty if it has none, or one that cuts nothing."""
    for hook in cfg.get('custom_hooks') or ():
        if (
            isinstance(hook, Mapping)
            and type_name(hook) == 'PruneHook'
            and not hook.get('rebuild_only')
        ):
            return {key: value for key, value in hook.items() if key != 'type'}
    return {}


def budget_options(hook: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a ``PruneHook`` that make up its budget; empty if it has none."""
    budget = hook.get('budget')
    if budget is not None:
        return budget.to_meta() if isinstance(budget, Budget) else dict(budget)
    names = {field.name for field in fields(Budget)}
    return {key: value for key, value in hook.items() if key in names}
