"""Draws the keypoints that an exported pose estimator finds, with numpy, OpenCV and ONNX Runtime only.

    python tools/export.py CONFIG CHECKPOINT --out model.onnx
    python examples/onnx_pose.py model.onnx picture.jpg --box 40 20 120 230 --out drawn.jpg

Neither PyTorch nor mmprune is imported, so this file can be copied to where the model is used. The
metadata of the model file describes how a person is cut out of the picture, and how the outputs are
decoded. The picture is not flipped. If the config has ``flip_test=True``, mmpose averages over a
flipped copy, too, so its results differ slightly.
"""

import argparse
import json
import sys
from typing import Any

import cv2
import numpy as np
import onnxruntime


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
    if about['task'] != 'pose':
        sys.exit(f'{path}: is a model for {about["task"]}, not for pose')
    if 'crop' not in about:
        sys.exit(f'{path}: does not say how people are cut out of a picture; export it again')
    decoder_of(about['codec'])
    return session, about


# -- from the picture to the model's input --------------------------------------------------------


def region(box: np.ndarray, about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Computes centre (x, y) and size (width, height) of the region that is cut out for a box (x1, y1,
    x2, y2), in pixels of the picture: the box is enlarged, and gets the ratio of the model's input."""
    x1, y1, x2, y2 = box
    height, width = about['input_size']
    size = np.array([x2 - x1, y2 - y1], np.float32) * about['crop']['padding']
    size = np.maximum(size, size[::-1] * np.array([width / height, height / width], np.float32))
    return np.array([x1 + x2, y1 + y2], np.float32) / 2, size


def prepare(picture: np.ndarray, box: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    """Makes the model's input (1, 3, H, W) from one box (x1, y1, x2, y2) of a BGR picture (h, w, 3)."""
    height, width = about['input_size']
    centre, size = region(box, about)
    target = np.array([width, height], np.float32)
    if about['crop']['use_udp']:  # UDP measures sizes between the centres of the outermost pixels
        factor, middle = (target - 1) / size, (target - 1) / 2
    else:
        factor, middle = target / size, target / 2
    matrix = np.array(
        [[factor[0], 0, middle[0] - factor[0] * centre[0]],
         [0, factor[1], middle[1] - factor[1] * centre[1]]], np.float32
    )  # fmt: skip
    cut = cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR).astype(np.float32)
    if not about['with_preprocess']:
        mean = np.array(about['mean'] or [0, 0, 0], np.float32)
        std = np.array(about['std'] or [1, 1, 1], np.float32)
        cut = ((cut[..., ::-1] if about['bgr_to_rgb'] else cut) - mean) / std
    return np.ascontiguousarray(cut.transpose(2, 0, 1)[None], np.float32)


# -- from the model's outputs to keypoints --------------------------------------------------------


def decoder_of(codec: dict[str, Any]) -> Any:
    """Returns the function that decodes the outputs of one box. It turns {name: (K, ...)} into points
    (K, 2) as fractions of the model's input, and scores (K,)."""
    kind = codec['type']
    if kind == 'SimCCLabel' and not codec.get('use_dark'):
        return from_simcc
    if kind == 'MSRAHeatmap' and not codec.get('unbiased'):
        return from_heatmaps
    if kind == 'UDPHeatmap' and codec.get('heatmap_type', 'gaussian') == 'gaussian':
        return from_udp_heatmaps
    options = ', '.join(f'{key}={codec[key]}' for key in ('use_dark', 'unbiased', 'heatmap_type') if
                        key in codec)  # fmt: skip
    sys.exit(f"codec {kind} ({options}): this example can't decode it; mmpose's codec of that name can")


def from_simcc(found: dict[str, np.ndarray], about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Decodes SimCC vectors: x and y of a keypoint are the positions of their maxima."""
    xs, ys = found['simcc_x'], found['simcc_y']
    scores = np.minimum(xs.max(1), ys.max(1))
    points = np.stack([xs.argmax(1), ys.argmax(1)], 1).astype(np.float32)
    points[scores <= 0] = -1
    height, width = about['input_size']
    return points / about['codec']['simcc_split_ratio'] / [width, height], scores


def best_places(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions (K, 2) of the maxima of heatmaps (K, h, w), as x and y, and the maxima
    (K,). A keypoint without a positive value gets the position -1, -1."""
    flat = heatmaps.reshape(len(heatmaps), -1)
    rows, columns = np.unravel_index(flat.argmax(1), heatmaps.shape[1:])
    scores = flat.max(1)
    points = np.stack([columns, rows], 1).astype(np.float32)
    points[scores <= 0] = -1
    return points, scores


def from_heatmaps(found: dict[str, np.ndarray], about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Decodes heatmaps: each maximum is moved by a quarter of a pixel towards the higher of its
    neighbours."""
    heatmaps = found['heatmaps']
    height, width = heatmaps.shape[1:]
    points, scores = best_places(heatmaps)
    for heatmap, point in zip(heatmaps, points, strict=True):
        x, y = point.astype(int)
        if 1 < x < width - 1 and 0 < y < height:
            point[0] += 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1])
        if 1 < y < height - 1 and 0 < x < width:
            point[1] += 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])
    return points / [width, height], scores


def from_udp_heatmaps(
    found: dict[str, np.ndarray], about: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes heatmaps by the maximum of a parabola through the logarithm of the blurred heatmap (UDP,
    CVPR 2020)."""
    heatmaps, kernel = found['heatmaps'], about['codec']['blur_kernel_size']
    height, width = heatmaps.shape[1:]
    points, scores = best_places(heatmaps)
    border = kernel // 2
    for heatmap, point in zip(heatmaps, points, strict=True):
        wide = cv2.GaussianBlur(np.pad(heatmap, border), (kernel, kernel), 0)
        blurred = wide[border:-border, border:-border]
        blurred = blurred * (heatmap.max() / blurred.max())
        log = np.pad(np.log(np.clip(blurred, 1e-3, 50)), 1, mode='edge')
        x, y = point.astype(int) + 1
        near = log[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if near.shape != (3, 3):  # a keypoint without a positive value lies outside of the map
            continue
        # A step of Newton's method from the maximum, with gradient and Hessian from differences.
        gradient = np.array([near[1, 2] - near[1, 0], near[2, 1] - near[0, 1]]) / 2
        mixed = near[2, 2] - near[1, 2] - near[2, 1] + 2 * near[1, 1]
        mixed = (mixed - near[1, 0] - near[0, 1] + near[0, 0]) / 2
        hessian = np.array([
            [near[1, 2] - 2 * near[1, 1] + near[1, 0], mixed],
            [mixed, near[2, 1] - 2 * near[1, 1] + near[0, 1]],
        ])  # fmt: skip
        point -= np.linalg.inv(hessian + np.finfo(np.float32).eps * np.eye(2)) @ gradient
    return points / [width - 1, height - 1], scores


def detect(
    session: onnxruntime.InferenceSession, about: dict[str, Any], picture: np.ndarray, box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the keypoints of the person in a box (x1, y1, x2, y2). Returns points (K, 2) as x and y in
    pixels of the picture, and scores (K,)."""
    names = [output.name for output in session.get_outputs()]
    batches = session.run(names, {session.get_inputs()[0].name: prepare(picture, box, about)})
    outputs = {name: value[0] for name, value in zip(names, batches, strict=True)}
    points, scores = decoder_of(about['codec'])(outputs, about)
    centre, size = region(box, about)
    return points * size + centre - size / 2, scores


# -- drawing --------------------------------------------------------------------------------------


def draw(picture: np.ndarray, points: np.ndarray, scores: np.ndarray, least: float) -> np.ndarray:
    """Returns a copy of the picture with a dot for each keypoint whose score is at least ``least``."""
    drawn = picture.copy()
    for index, (x, y) in enumerate(points):
        if scores[index] >= least:
            hue = np.uint8([[[index * 67 % 180, 220, 230]]])
            colour = tuple(int(value) for value in cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0])
            cv2.circle(drawn, (int(round(float(x))), int(round(float(y)))), 3, colour, -1, cv2.LINE_AA)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description='Draws the keypoints that an exported model finds.')
    parser.add_argument('model', help='.onnx file of tools/export.py')
    parser.add_argument('picture')
    parser.add_argument(
        '--box', type=float, nargs=4, action='append', metavar=('X1', 'Y1', 'X2', 'Y2'),
        help="a person's box in pixels; several may be given (default: the whole picture)",
    )  # fmt: skip
    parser.add_argument('--out', default='drawn.jpg', help='the picture with the keypoints')
    parser.add_argument('--score', type=float, default=0.3, help='the least score that is drawn')
    args = parser.parse_args()
    picture = cv2.imread(args.picture)
    if picture is None:
        sys.exit(f'{args.picture}: no such file, or no picture')
    session, about = load(args.model)
    drawn = picture
    for box in args.box or [[0, 0, picture.shape[1], picture.shape[0]]]:
        if box[2] <= box[0] or box[3] <= box[1]:
            sys.exit(f'--box {" ".join(map(str, box))}: must be the left, top, right and bottom sides')
        points, scores = detect(session, about, picture, np.array(box, np.float32))
        for index, ((x, y), score) in enumerate(zip(points, scores, strict=True)):
            name = about['keypoints'][index] if index < len(about['keypoints']) else str(index)
            print(f'{name:16} {score:.3f}  {x:7.1f} {y:7.1f}')
        drawn = draw(drawn, points, scores, args.score)
    if not cv2.imwrite(args.out, drawn):
        sys.exit(f'{args.out}: could not be written')


if __name__ == '__main__':
    main()
