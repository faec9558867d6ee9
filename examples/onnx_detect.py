"""Draws the detections of an exported detector on a picture, with numpy, OpenCV and ONNX Runtime only.

    python tools/export.py CONFIG CHECKPOINT --out model.onnx
    python examples/onnx_detect.py model.onnx picture.jpg --out drawn.jpg

Neither PyTorch nor mmprune is imported, so this file can be copied to where the model is used. The
metadata of the model file describes how a picture has to be prepared.
"""

import argparse
import json
import sys
from typing import Any

import cv2
import numpy as np
import onnxruntime

INTERPOLATION = {
    'nearest': cv2.INTER_NEAREST, 'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC,
    'area': cv2.INTER_AREA, 'lanczos': cv2.INTER_LANCZOS4,
}  # fmt: skip
"""{name of an interpolation in the metadata: flag of OpenCV}."""


def load(path: str) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Opens a model file, and reads the metadata that ``tools/export.py`` wrote into it."""
    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    except Exception as error:  # the exceptions of ONNX Runtime have no common base
        sys.exit(f'{path}: can not be loaded: {error}')
    metadata = session.get_modelmeta().custom_metadata_map
    if 'mmprune' not in metadata:
        sys.exit(f"{path}: has no metadata 'mmprune'; export the model with tools/export.py")
    about = json.loads(metadata['mmprune'])
    if about['task'] != 'detection':
        sys.exit(f'{path}: is a model for {about["task"]}, not for detection')
    return session, about


def sizes(shape: tuple[int, int], about: dict[str, Any]) -> list[tuple[int, int]]:
    """Computes three sizes as (height, width): that of the resized picture, that of the picture with
    the pipeline's padding, and that of the model's input.

    Args:
        shape: height and width of the picture.
        about: the metadata of the model file.
    """
    resize, pad, fixed = about['resize'] or {}, about['pad'] or {}, about['input_size']
    factors = resize.get('scale_factor', [1, 1])[::-1]
    if 'scale' in resize:
        # The ratio of the picture is kept. Its longer side must fit the longer side of the scale, and
        # its shorter side the shorter one, so the orientation of the scale does not matter.
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
    # ``-(-a // b)`` divides and rounds up.
    padded = tuple(-(-side // step) * step for side in padded)
    input_size = tuple(-(-side // last_step) * last_step for side in padded)
    if fixed:
        padded, input_size = (tuple(fixed) if pad else resized), tuple(fixed)
    return [resized, padded, input_size]


def prepare(
    picture: np.ndarray, about: dict[str, Any], size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the model's input from a BGR picture, and returns it with the factors by which x and y were
    multiplied.

    The picture is resized and padded like in the test pipeline of the model's config, which the
    metadata describes.

    Args:
        picture: (height, width, 3), in the order blue, green, red, 0 to 255.
        about: the metadata of the model file.
        size: height and width into which the picture is fitted; ``None`` uses the scale of the
            pipeline.

    Returns:
        (the input (1, 3, H, W) float32, the factors (2,) of x and of y)
    """
    if size is None and 'resize' not in about:
        print('The model does not say how its pictures are resized; give --size', file=sys.stderr)
        size = about['input_size'] or picture.shape[:2]
    about = about if size is None else fitted(about, size)
    (height, width), padded, input_size = sizes(picture.shape[:2], about)
    scale = np.array([width / picture.shape[1], height / picture.shape[0]], np.float32)
    if (height, width) != picture.shape[:2]:
        interpolation = INTERPOLATION[(about['resize'] or {}).get('interpolation', 'bilinear')]
        picture = cv2.resize(picture, (width, height), interpolation=interpolation)
    mean = np.array(about['mean'] or [0, 0, 0], np.float32)
    std = np.array(about['std'] or [1, 1, 1], np.float32)
    order = slice(None, None, -1 if about['bgr_to_rgb'] else 1)
    images = np.full((*input_size, 3), about['pad_value'], np.float32)
    if about['pad']:  # the pipeline pads before it normalises, so its padding is normalised, too
        value = np.broadcast_to(np.array(about['pad']['value'], np.float32), 3)
        images[: padded[0], : padded[1]] = (value[order] - mean) / std
    images[:height, :width] = (picture[..., order].astype(np.float32) - mean) / std
    if about['with_preprocess']:  # the model normalises, so it takes BGR pictures from 0 to 255
        images = (images * std + mean)[..., order]
    return np.ascontiguousarray(images.transpose(2, 0, 1)[None], np.float32), scale


def fitted(about: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns the metadata for pictures that are fitted into ``size`` (height, width), rounded up to
    multiples that the model takes."""
    fixed = about['input_size']
    if fixed and tuple(size) != tuple(fixed):
        sys.exit(f'--size {size[0]} {size[1]}: the model takes {fixed} alone')
    divisor = about['pad_divisor']
    height, width = (-(-side // divisor) * divisor for side in size)
    old = about.get('resize') or {}
    resize = {
        'scale': [width, height], 'keep_ratio': old.get('keep_ratio', True),
        'interpolation': old.get('interpolation', 'bilinear'),
    }  # fmt: skip
    return about | {'resize': resize, 'pad': about.get('pad'), 'input_size': [height, width]}


def detect(
    session: onnxruntime.InferenceSession,
    about: dict[str, Any],
    picture: np.ndarray,
    least_score: float = 0.3,
    size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Runs the model on a picture. Returns ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the picture,
    ``scores`` (n,), ``labels`` (n,), and ``masks`` (n, height, width) bool if the model has masks."""
    images, scale = prepare(picture, about, size)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))
    dets, labels = outputs['dets'][0], outputs['labels'][0]
    # Rows beyond the last detection have the label -1.
    is_shown = (labels >= 0) & (dets[:, 4] >= least_score)
    height, width = picture.shape[:2]
    boxes = np.clip(dets[is_shown, :4] / np.tile(scale, 2), 0, [width, height, width, height])
    result = {'boxes': boxes, 'scores': dets[is_shown, 4], 'labels': labels[is_shown]}
    if 'masks' in outputs:
        masks = outputs['masks'][0][is_shown]
        pasted = [paste(mask, box, (height, width)) for mask, box in zip(masks, boxes, strict=True)]
        result['masks'] = np.array(pasted, dtype=bool).reshape(-1, height, width)
    return result


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretches a mask's probabilities (h, w) over its box, and returns where they are at least 0.5, as
    (height, width) bool."""
    x1, y1, x2, y2 = box
    step_x, step_y = (x2 - x1) / mask.shape[1], (y2 - y1) / mask.shape[0]
    if step_x <= 0 or step_y <= 0:
        return np.zeros(size, bool)
    # Maps centres of pixels of the mask to the picture.
    matrix = np.array(
        [[step_x, 0, x1 + step_x / 2 - 0.5], [0, step_y, y1 + step_y / 2 - 0.5]], np.float32
    )
    return cv2.warpAffine(mask.astype(np.float32), matrix, size[::-1], flags=cv2.INTER_LINEAR) >= 0.5


def draw(picture: np.ndarray, found: dict[str, np.ndarray], classes: list[str]) -> np.ndarray:
    """Returns a copy of the picture with boxes, names and scores."""
    drawn = picture.copy()
    for row, (box, score, label) in enumerate(
        zip(found['boxes'], found['scores'], found['labels'], strict=True)
    ):
        # Neighbouring classes get hues that are far apart.
        hue = np.uint8([[[int(label) * 67 % 180, 220, 230]]])
        colour = tuple(int(value) for value in cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0])
        if 'masks' in found:
            inside = found['masks'][row]
            drawn[inside] = (drawn[inside] * 0.5 + np.array(colour) * 0.5).astype(np.uint8)
        x1, y1, x2, y2 = (int(round(float(value))) for value in box)
        cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, 1)
        cv2.putText(
            drawn, f'{name_of(label, classes)} {score:.2f}', (x1, max(10, y1 - 3)),
            cv2.FONT_HERSHEY_SIMPLEX, 0.35, colour, 1, cv2.LINE_AA,
        )  # fmt: skip
    return drawn


def name_of(label: int, classes: list[str]) -> str:
    return classes[label] if label < len(classes) else str(label)


def main() -> None:
    parser = argparse.ArgumentParser(description='Draws what an exported detector finds on a picture.')
    parser.add_argument('model', help='.onnx file of tools/export.py')
    parser.add_argument('picture')
    parser.add_argument('--out', default='drawn.jpg', help='the picture with the detections')
    parser.add_argument('--score', type=float, default=0.3, help='the least score that is drawn')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
        help="fit the picture into this (default: as the test pipeline of the model's config does it)",
    )  # fmt: skip
    args = parser.parse_args()
    picture = cv2.imread(args.picture)
    if picture is None:
        sys.exit(f'{args.picture}: no such file, or no picture')
    session, about = load(args.model)
    detections = detect(session, about, picture, args.score, args.size)
    for box, score, label in zip(
        detections['boxes'], detections['scores'], detections['labels'], strict=True
    ):
        corners = ' '.join(f'{value:7.1f}' for value in box)
        print(f'{name_of(label, about["classes"]):16} {score:.3f}  {corners}')
    if not cv2.imwrite(args.out, draw(picture, detections, about['classes'])):
        sys.exit(f'{args.out}: could not be written')


if __name__ == '__main__':
    main()
