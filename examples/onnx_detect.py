"""Draws what an exported detector finds on a picture, with numpy, OpenCV and ONNX Runtime alone.

    python tools/export.py CONFIG CHECKPOINT --out model.onnx
    python examples/onnx_detect.py model.onnx picture.jpg --out drawn.jpg

Neither PyTorch nor mmprune is imported: copy this file to where the model is used. How a picture has
to be prepared stands in the model file.
"""

import argparse
import json
import sys

import cv2
import numpy as np
import onnxruntime


def load(path: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """The model, ready to run, and what ``tools/export.py`` wrote into it."""
    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    except Exception as error:  # no such file, no model: its exceptions have no common base
        sys.exit(f'{path}: can not be loaded: {error}')
    metadata = session.get_modelmeta().custom_metadata_map
    if 'mmprune' not in metadata:
        sys.exit(f"{path}: has no metadata 'mmprune'; export the model with tools/export.py")
    about = json.loads(metadata['mmprune'])
    if about['task'] != 'detection':
        sys.exit(f'{path}: is a model for {about["task"]}, not for detection')
    return session, about


def prepare(
    picture: np.ndarray, about: dict, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The model's input of a BGR picture (h, w, 3), and by what x and y were multiplied.

    The picture is resized to fit into ``size`` (height, width), by default the model's own, where it
    has one, or the picture's; what is missing is filled up on the right and below.
    """
    height, width = size or about['input_size'] or picture.shape[:2]
    ratio = min(height / picture.shape[0], width / picture.shape[1])
    new_height, new_width = (max(1, round(side * ratio)) for side in picture.shape[:2])
    scale = np.array([new_width / picture.shape[1], new_height / picture.shape[0]], np.float32)
    if not about['input_size']:  # any size that is a multiple of this
        divisor = about['pad_divisor']
        height, width = (-(-side // divisor) * divisor for side in (height, width))
    elif (height, width) != tuple(about['input_size']):
        sys.exit(f'--size {height} {width}: the model takes {about["input_size"]} alone')
    if (new_height, new_width) != picture.shape[:2]:
        picture = cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    mean = np.array(about['mean'] or [0, 0, 0], np.float32)
    std = np.array(about['std'] or [1, 1, 1], np.float32)
    image = picture[..., ::-1] if about['bgr_to_rgb'] else picture
    image = (image.astype(np.float32) - mean) / std
    filled = np.full((height, width, 3), about['pad_value'], np.float32)
    filled[:new_height, :new_width] = image
    if about['with_preprocess']:  # the model does it itself, to BGR from 0 to 255
        filled = filled * std + mean
        filled = filled[..., ::-1] if about['bgr_to_rgb'] else filled
    return np.ascontiguousarray(filled.transpose(2, 0, 1)[None], np.float32), scale


def detect(
    session: onnxruntime.InferenceSession,
    about: dict,
    picture: np.ndarray,
    least_score: float = 0.3,
    size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the picture, ``scores`` (n,), ``labels`` (n,),
    and where the model has masks ``masks`` (n, height, width) bool."""
    images, scale = prepare(picture, about, size)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))
    dets, labels = found['dets'][0], found['labels'][0]
    # Rows beyond the last detection have the label -1.
    real = (labels >= 0) & (dets[:, 4] >= least_score)
    height, width = picture.shape[:2]
    boxes = np.clip(dets[real, :4] / np.tile(scale, 2), 0, [width, height, width, height])
    result = {'boxes': boxes, 'scores': dets[real, 4], 'labels': labels[real]}
    if 'masks' in found:
        masks = found['masks'][0][real]
        pasted = [paste(mask, box, (height, width)) for mask, box in zip(masks, boxes, strict=True)]
        result['masks'] = np.array(pasted, dtype=bool).reshape(-1, height, width)
    return result


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: a mask's probabilities (h, w), stretched over its box."""
    x1, y1, x2, y2 = box
    step_x, step_y = (x2 - x1) / mask.shape[1], (y2 - y1) / mask.shape[0]
    if step_x <= 0 or step_y <= 0:
        return np.zeros(size, bool)
    # Centres of pixels, from the mask's grid to the picture's.
    matrix = np.array(
        [[step_x, 0, x1 + step_x / 2 - 0.5], [0, step_y, y1 + step_y / 2 - 0.5]], np.float32
    )
    return cv2.warpAffine(mask.astype(np.float32), matrix, size[::-1], flags=cv2.INTER_LINEAR) >= 0.5


def draw(picture: np.ndarray, found: dict[str, np.ndarray], classes: list[str]) -> np.ndarray:
    """A copy of the picture with boxes, names and scores."""
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
        help="fit the picture into this (default: the model's size, or the picture's)",
    )  # fmt: skip
    args = parser.parse_args()
    picture = cv2.imread(args.picture)
    if picture is None:
        sys.exit(f'{args.picture}: no such file, or no picture')
    session, about = load(args.model)
    found = detect(session, about, picture, args.score, args.size)
    for box, score, label in zip(found['boxes'], found['scores'], found['labels'], strict=True):
        corners = ' '.join(f'{value:7.1f}' for value in box)
        print(f'{name_of(label, about["classes"]):16} {score:.3f}  {corners}')
    if not cv2.imwrite(args.out, draw(picture, found, about['classes'])):
        sys.exit(f'{args.out}: could not be written')


if __name__ == '__main__':
    main()
