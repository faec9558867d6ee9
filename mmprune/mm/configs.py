"""Reads data sets, test pipelines and prune hooks in configs of mmengine, mmdet and mmpose."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmprune.budget.budget import Budget

SIZE_KEYS = ('scale', 'size', 'img_scale', 'input_size', 'crop_size')
"""The options of OpenMMLab's transforms that set a size of images, as (width, height)."""


def dataset_with_pipeline(dataset: Any) -> Any:
    """Finds the data set with a pipeline inside wrappers such as ``RepeatDataset``.

    Args:
        dataset: the config of a data set, with or without wrappers around it.

    Returns:
        The outermost config that has a ``pipeline``; the innermost config if none has.
    """
    while 'pipeline' not in dataset and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    return dataset


def test_steps(cfg: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the transforms of the test pipeline, or else of the validation pipeline; empty without
    both."""
    loader = (cfg or {}).get('test_dataloader') or (cfg or {}).get('val_dataloader') or {}
    return list(dataset_with_pipeline(loader.get('dataset') or {}).get('pipeline') or ())


def type_name(entry: Any) -> str:
    """Returns the class name of a config entry or an object without its scope, e.g. ``Resize`` for
    ``dict(type='mmdet.Resize')``."""
    cls = entry.get('type') if isinstance(entry, Mapping) else type(entry)
    return (cls if isinstance(cls, str) else getattr(cls, '__name__', str(cls))).rpartition('.')[2]


def image_size(cfg: Mapping[str, Any] | None, only_fixed: bool = False) -> tuple[int, int] | None:
    """Returns the size of the images on which a config tests.

    A pipeline either gives all images one size, or keeps their ratio within some limits, such as
    ``Resize(scale=(1333, 800), keep_ratio=True)``. In the second case, the result is the size of an
    image that fills the limits, in this example (800, 1333).

    Args:
        cfg: a config; ``None``: a config without a pipeline.
        only_fixed: whether to return ``None`` unless all images leave the pipeline with the same size.

    Returns:
        (height, width) in pixels; ``None`` if no transform of the test pipeline sets a size.
    """
    size, is_fixed = None, False
    for step in test_steps(cfg):
        transform = type_name(step)
        sizes = [pair for key in SIZE_KEYS if (pair := _height_width(step.get(key)))]
        if sizes:
            is_fixed = transform in ('Pad', 'LoadCrop') or (
                transform == 'Resize' and not step.get('keep_ratio')
            )
            size = sizes[-1]
        elif transform == 'Resize':  # Resize by a factor, which keeps different sizes
            size, is_fixed = None, False
        elif transform == 'Pad' and step.get('pad_to_square') and size is not None:
            # With a kept ratio, the longer side of each image fills a square limit, so padding to a
            # square gives all images this size.
            is_fixed = is_fixed or size[0] == size[1]
            size = (max(size), max(size))
    return size if is_fixed or not only_fixed else None


def _height_width(value: Any) -> tuple[int, int] | None:
    """Returns (height, width) from the side of a square or from OpenMMLab's (width, height); ``None``
    for other values."""
    sides = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if is_pair and all(isinstance(side, int) and side > 0 for side in sides):
        return sides[1], sides[0]
    return None


def prune_hook_options(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the config's ``PruneHook``; empty if it has none. A hook with
    ``rebuild_only``, an option of earlier versions, does not count: it cut nothing."""
    for hook in cfg.get('custom_hooks') or ():
        if (
            isinstance(hook, Mapping)
            and type_name(hook) == 'PruneHook'
            and not hook.get('rebuild_only')
        ):
            return {key: value for key, value in hook.items() if key != 'type'}
    return {}


def budget_options(hook: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the budget among the options of a ``PruneHook`` as a dict; empty if there is none."""
    budget = hook.get('budget')
    if budget is not None:
        return budget.to_meta() if isinstance(budget, Budget) else dict(budget)
    names = {field.name for field in fields(Budget)}
    return {key: value for key, value in hook.items() if key in names}
