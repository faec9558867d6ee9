"""Describes how a config's test pipeline prepares a picture, for the metadata of an exported file.

A detector's metadata has two entries. ``resize`` is ``None`` if pictures keep their size. Otherwise it
has ``interpolation`` and either ``scale`` (width, height) with ``keep_ratio``, or ``scale_factor`` (of
the width, of the height). ``pad`` is ``None``, or has ``value`` (a number, or blue, green and red, 0
to 255), ``size`` (height, width), ``divisor`` and ``square``. A pose estimator's metadata has
``crop``: ``padding``, by which a person's box is enlarged, and ``use_udp``.

``examples/onnx_detect.py`` and ``examples/onnx_pose.py`` prepare pictures by these entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import nn

from mmprune.mm.configs import image_size, test_steps, type_name

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'area', 'lanczos')
"""The interpolations of OpenCV by their names in a pipeline."""

WITHOUT_EFFECT = ('LoadImage', 'Pack', 'Filter')
"""Beginnings of the names of transforms that do not change the pixels of a picture."""


def describe(cfg: Mapping[str, Any] | None, size: Sequence[int] | None) -> dict[str, Any]:
    """Returns the entries of the metadata that say how a picture is prepared.

    Args:
        cfg: a config with a test pipeline. ``None`` counts as a config without one.
        size: (height, width) of the exported file's input; ``None`` for an open size.

    Returns:
        {``resize``, ``pad``} or {``crop``}, as the docstring of the module describes them. If the
        config has no test pipeline, the result is empty. If the pipeline has a transform that these
        entries cannot describe, the result is empty and a message is logged.
    """
    steps = [
        step
        for step in test_steps(cfg)
        if not type_name(step).startswith(WITHOUT_EFFECT) and 'Annotations' not in type_name(step)
    ]
    names = [type_name(step) for step in steps]
    if not test_steps(cfg):
        return {}
    if names == ['GetBBoxCenterScale', 'TopdownAffine']:
        padding, use_udp = steps[0].get('padding', 1.25), steps[1].get('use_udp', False)
        return {'crop': {'padding': padding, 'use_udp': bool(use_udp)}}
    if names not in ([], ['Resize'], ['Pad'], ['Resize', 'Pad']) or not all(map(_is_plain, steps)):
        print_log(
            f'The file does not say how its pictures are resized: the test pipeline has '
            f'{", ".join(names)}, and only a Resize and a Pad by OpenCV can be described. Prepare '
            'pictures for the file as the pipeline does',
            'current',
        )
        return {}
    step_by_name = dict(zip(names, steps, strict=True))
    resize = _resize(step_by_name['Resize']) if 'Resize' in step_by_name else None
    pad = _pad(step_by_name['Pad']) if 'Pad' in step_by_name else None
    if size is not None and tuple(size) != image_size(cfg, only_fixed=True):
        keep_ratio = resize.get('keep_ratio', True) if resize else True
        interpolation = resize['interpolation'] if resize else 'bilinear'
        scale = [size[1], size[0]]  # (width, height), as in a pipeline
        resize = {'scale': scale, 'keep_ratio': keep_ratio, 'interpolation': interpolation}
    return {'resize': resize, 'pad': pad}


def normalization_of(preprocessor: nn.Module) -> dict[str, Any]:
    """Returns the ``mean`` and ``std`` of a model's ``data_preprocessor`` (``None`` without
    normalization), and whether it turns BGR into RGB (``bgr_to_rgb``)."""
    normalizes = getattr(preprocessor, '_enable_normalize', False)
    return {
        'mean': preprocessor.mean.flatten().tolist() if normalizes else None,
        'std': preprocessor.std.flatten().tolist() if normalizes else None,
        'bgr_to_rgb': bool(getattr(preprocessor, '_channel_conversion', False)),
    }


def _is_plain(step: Mapping[str, Any]) -> bool:
    """Returns whether all options of a transform are among those that the metadata can describe."""
    return (
        step.get('backend', 'cv2') == 'cv2'
        and step.get('interpolation', 'bilinear') in INTERPOLATIONS
        and step.get('padding_mode', 'constant') == 'constant'
    )


def _resize(step: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes the entry ``resize`` from the transform ``Resize``; ``None`` if it keeps the size."""
    options = {'interpolation': step.get('interpolation', 'bilinear')}
    scale, factor = step.get('scale'), step.get('scale_factor')
    if scale is None:
        factors = [factor, factor] if isinstance(factor, int | float) else list(factor)
        return None if factors == [1, 1] else {'scale_factor': factors} | options
    sides = [scale, scale] if isinstance(scale, int) else list(scale)
    return {'scale': sides, 'keep_ratio': bool(step.get('keep_ratio', False))} | options


def _pad(step: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the entry ``pad`` from the transform ``Pad``."""
    value = step.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    size = step.get('size')
    return {
        'value': value if isinstance(value, int | float) else list(value),
        'size': [size[1], size[0]] if size else None,
        'divisor': step.get('size_divisor'),
        'square': bool(step.get('pad_to_square', False)),
    }
