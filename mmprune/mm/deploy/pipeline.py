"""What a config's test pipeline does to a picture before the model's preprocessor gets it: as plain
data in an exported file's metadata, and done to a picture with numpy and OpenCV.

The metadata of a detector has two entries. ``resize`` is ``None`` if pictures keep their size;
otherwise it is a dict of ``interpolation`` and either ``scale`` (width, height) with ``keep_ratio``, or
``scale_factor`` (of the width, of the height). ``pad`` is ``None``, or a dict of ``value`` (a number,
or blue, green and red, 0 to 255), ``size`` (height, width), ``divisor`` and ``square``. The metadata of
a pose estimator has ``crop``: ``padding``, by which a person's box is enlarged, and ``use_udp``.

``examples/onnx_detect.py`` has its own :func:`prepare`, since it has to run without mmprune.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from mmengine.logging import print_log

from mmprune.errors import PruneError

INTERPOLATION = {
    'nearest': cv2.INTER_NEAREST, 'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC,
    'area': cv2.INTER_AREA, 'lanczos': cv2.INTER_LANCZOS4,
}  # fmt: skip

WITHOUT_EFFECT = ('LoadImage', 'LoadImageFromFile', 'LoadImageFromNDArray', 'Pack', 'Filter')
"""Names, or their beginnings, of transforms that leave a picture as it is."""


def steps_of(cfg: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The transforms of a config's test pipeline; none without a config or a pipeline."""
    loader = (cfg or {}).get('test_dataloader') or (cfg or {}).get('val_dataloader') or {}
    dataset = loader.get('dataset', {})
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return list(dataset.get('pipeline') or ())


def name_of(step: Mapping[str, Any]) -> str:
    """The name of a transform's class without its scope: ``Resize`` of ``mmdet.Resize``."""
    kind = step.get('type')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def size_in(cfg: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) of every image that leaves the test pipeline of a config, if it fixes them."""
    size = scale = None
    for step in steps_of(cfg):
        kind = name_of(step)
        if kind == 'Resize':
            scale = None if step.get('scale') is None else _pair(step['scale'])[::-1]
            size = None if step.get('keep_ratio', False) else scale
        elif kind == 'LoadCrop':
            size = (step['size'], step['size'])
        elif kind == 'Pad' and step.get('size'):
            size = (step['size'][1], step['size'][0])
        elif kind == 'Pad' and step.get('pad_to_square'):
            # With its ratio kept, a picture's longer side becomes that of a square scale.
            square = scale if scale is not None and scale[0] == scale[1] else None
            size = (max(size), max(size)) if size else square
    return size


def _pair(scale: Any) -> tuple[int, int]:
    return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])


# -- as data --------------------------------------------------------------------------------------


def describe(cfg: Mapping[str, Any] | None, size: Sequence[int] | None) -> dict[str, Any]:
    """The entries of a detector's or a pose estimator's metadata that say how a picture is prepared.

    Args:
        cfg: a config with a test pipeline; ``None``: unknown.
        size: (height, width) of the exported file's input; ``None``: open.

    Returns:
        ``resize`` and ``pad``, or ``crop``. Nothing, with a message, if the pipeline has a transform
        that these do not describe.
    """
    steps = [step for step in steps_of(cfg) if not name_of(step).startswith(WITHOUT_EFFECT)]
    steps = [step for step in steps if 'Annotations' not in name_of(step)]
    kinds = [name_of(step) for step in steps]
    if not steps_of(cfg):
        return {}
    if kinds == ['GetBBoxCenterScale', 'TopdownAffine']:
        padding, use_udp = steps[0].get('padding', 1.25), steps[1].get('use_udp', False)
        return {'crop': {'padding': padding, 'use_udp': bool(use_udp)}}
    if kinds not in ([], ['Resize'], ['Pad'], ['Resize', 'Pad']) or not all(map(_known, steps)):
        print_log(
            f'The file does not say how its pictures are resized: the test pipeline has '
            f'{", ".join(kinds)}, and only a Resize and a Pad by OpenCV can be described. Prepare '
            'pictures for the file as the pipeline does',
            'current',
        )
        return {}
    named = dict(zip(kinds, steps, strict=True))
    resize = _resize(named['Resize']) if 'Resize' in named else None
    pad = _pad(named['Pad']) if 'Pad' in named else None
    if size is not None and tuple(size) != size_in(cfg):
        ratio = resize.get('keep_ratio', True) if resize else True
        how = resize['interpolation'] if resize else 'bilinear'
        resize = {'scale': [size[1], size[0]], 'keep_ratio': ratio, 'interpolation': how}
    return {'resize': resize, 'pad': pad}


def _known(step: Mapping[str, Any]) -> bool:
    return (
        step.get('backend', 'cv2') == 'cv2'
        and step.get('interpolation', 'bilinear') in INTERPOLATION
        and step.get('padding_mode', 'constant') == 'constant'
    )


def _resize(step: Mapping[str, Any]) -> dict[str, Any] | None:
    how = {'interpolation': step.get('interpolation', 'bilinear')}
    factor = step.get('scale_factor')
    if step.get('scale') is None:
        factors = [factor, factor] if isinstance(factor, int | float) else list(factor)
        return None if factors == [1, 1] else {'scale_factor': factors} | how
    keep_ratio = bool(step.get('keep_ratio', False))
    return {'scale': list(_pair(step['scale'])), 'keep_ratio': keep_ratio} | how


def _pad(step: Mapping[str, Any]) -> dict[str, Any]:
    value = step.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    size = step.get('size')
    return {
        'value': value if isinstance(value, int | float) else list(value),
        'size': [size[1], size[0]] if size else None,
        'divisor': step.get('size_divisor'),
        'square': bool(step.get('pad_to_square', False)),
    }


# -- on a picture ---------------------------------------------------------------------------------


def input_size(about: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of a file's input for a picture that fills the pipeline's scale; ``None`` where
    the metadata ``about`` names neither a size nor a scale."""
    if about['input_size']:
        return tuple(about['input_size'])
    scale = (about.get('resize') or {}).get('scale')  # width, height
    return None if scale is None else sizes((scale[1], scale[0]), about)[2]


def sizes(shape: tuple[int, int], about: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of a resized picture, of it with the pipeline's padding, and of the file's input.

    Args:
        shape: height and width of the picture.
        about: the metadata of the file.
    """
    resize, pad, fixed = about['resize'] or {}, about['pad'] or {}, about['input_size']
    factors = resize.get('scale_factor', [1, 1])[::-1]
    if 'scale' in resize:  # the picture's ratio is kept: its sides fit, in either direction
        width, height = resize['scale']
        ratio = min(max(width, height) / max(shape), min(width, height) / min(shape))
        factors = [ratio, ratio]
    if fixed:
        fitting = min(fixed[0] / shape[0], fixed[1] / shape[1])
        factors = [min(factor, fitting) for factor in factors]
    resized = tuple(
        max(1, int(side * factor + 0.5)) for side, factor in zip(shape, factors, strict=True)
    )
    if not resize.get('keep_ratio', True):
        resized = (height, width)
    padded = resized
    if pad.get('square'):
        padded = (max(padded), max(padded))
    if pad.get('size'):
        padded = tuple(map(max, padded, pad['size']))
    step, last_step = pad.get('divisor') or 1, about['pad_divisor']
    padded = tuple(-(-side // step) * step for side in padded)
    full = tuple(-(-side // last_step) * last_step for side in padded)
    if fixed:
        padded, full = (tuple(fixed) if pad else resized), tuple(fixed)
    return [resized, padded, full]


def prepare(picture: np.ndarray, about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A file's input for one picture, prepared as the test pipeline and the model's preprocessor do it.

    Args:
        picture: (height, width, 3), blue first, 0 to 255.
        about: the metadata of the file.

    Returns:
        The input (1, 3, H, W) float32, and the factors by which x and y were multiplied.

    Raises:
        PruneError: the file does not say how its pictures are resized.
    """
    if 'resize' not in about:
        raise PruneError(
            'the file does not say how a picture is resized: its task is not detection, its test '
            'pipeline can not be described, or an earlier mmprune exported it (export it again)'
        )
    (height, width), padded, full = sizes(picture.shape[:2], about)
    scale = np.array([width / picture.shape[1], height / picture.shape[0]], np.float32)
    if (height, width) != picture.shape[:2]:
        how = INTERPOLATION[(about['resize'] or {}).get('interpolation', 'bilinear')]
        picture = cv2.resize(picture, (width, height), interpolation=how)
    mean = np.array(about['mean'] or [0, 0, 0], np.float32)
    std = np.array(about['std'] or [1, 1, 1], np.float32)
    order = slice(None, None, -1 if about['bgr_to_rgb'] else 1)
    images = np.full((*full, 3), about['pad_value'], np.float32)
    if about['pad']:
        value = np.broadcast_to(np.array(about['pad']['value'], np.float32), 3)
        images[: padded[0], : padded[1]] = (value[order] - mean) / std
    images[:height, :width] = (picture[..., order].astype(np.float32) - mean) / std
    if about['with_preprocess']:  # the file does that itself, to BGR from 0 to 255
        images = (images * std + mean)[..., order]
    return np.ascontiguousarray(images.transpose(2, 0, 1)[None], np.float32), scale
