"""Pose estimators for export: one network from the image to heatmaps or SimCC vectors.

Decoding (the maximum, its refinement, flips) stays outside of the file: it is a few lines of numpy, and
every runtime has its own (``simcc_x``, ``simcc_y`` as rtmlib and mmdeploy's runtimes take them).
"""

import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError

OUTPUTS = {'heatmap': ('heatmaps',), 'simcc': ('simcc_x', 'simcc_y')}
"""Names of the outputs: (N, K, h, w), or (N, K, Wx) and (N, K, Wy)."""


class PoseNetwork(nn.Module):
    """``forward(input)``: normalised images (N, 3, H, W) -> heatmaps (N, K, h, w), of several stages
    those of the last one; or a pair ``simcc_x`` (N, K, Wx), ``simcc_y`` (N, K, Wy).

    ``output_names``: what the outputs are called in the file. ``metadata``: what its metadata says of a
    pose estimator (``task``, ``codec``). ``input_size``: (height, width), fixed by the codec.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.output_names = OUTPUTS[kind]
        self.metadata = {'task': 'pose', 'codec': codec_of(model.head.decoder)}
        width, height = model.head.decoder.input_size
        self.input_size = (int(height), int(width))

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out = self.model.head.forward(self.model.extract_feat(input))
        if self.kind == 'simcc':
            return out[0], out[1]
        return out if isinstance(out, torch.Tensor) else out[-1]


def pose_wrapper(model: nn.Module) -> PoseNetwork | None:
    """The network to export of a top-down pose estimator with a heatmap or SimCC head, in evaluation
    mode; ``None`` where the model is something else.

    Raises:
        PruneError: its head has no decoder, so that nobody could tell keypoints from its outputs.
    """
    # Where mmpose was never imported the model is none of its own.
    if 'mmpose.models' not in sys.modules:
        return None
    from mmpose.models import TopdownPoseEstimator

    head = getattr(model, 'head', None)
    kind = head_kind(head)
    if not isinstance(model, TopdownPoseEstimator) or kind is None:
        return None
    if getattr(head, 'decoder', None) is None:
        raise PruneError(
            f'head ({type(head).__name__}): has no decoder; add decoder=codec to model.head in the '
            'config'
        )
    return PoseNetwork(model, kind).eval()


def handed_to_codec(model: nn.Module, images: torch.Tensor) -> Any:
    """What the model's own ``predict`` decodes, of (N, 3, H, W) images without flips: heatmaps, or a
    pair of SimCC vectors."""
    handed: list[Any] = []

    def decode(found: Any, *_: Any) -> list[Any]:
        handed.append(found)
        return []

    with mock.patch.object(model.head, 'decode', decode):
        model.head.predict(model.extract_feat(images), [], test_cfg={})
    return handed[0]


def head_kind(head: nn.Module | None) -> str | None:
    """``heatmap``, ``simcc``, or ``None`` for heads that give neither."""
    from mmpose.models import heads

    if isinstance(head, heads.RTMCCHead | heads.SimCCHead | heads.RTMWHead):
        return 'simcc'
    # Associative embedding has a second output, the tags, without which its heatmaps are of no use.
    if isinstance(head, heads.AssociativeEmbeddingHead):
        return None
    return 'heatmap' if isinstance(head, heads.HeatmapHead | heads.CPMHead | heads.MSPNHead) else None


def gives_stages(head: nn.Module) -> bool:
    """Whether a heatmap head gives a list, a tensor for each stage, of which the last counts."""
    from mmpose.models import heads

    return isinstance(head, heads.CPMHead | heads.MSPNHead)


def codec_of(decoder: Any) -> dict[str, Any]:
    """A codec as plain data: the name of its class as ``type``, its settings (sizes: width, height)."""
    settings = {'type': type(decoder).__name__}
    for name, value in vars(decoder).items():
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if isinstance(value, tuple):
            value = list(value)
        if value is None or isinstance(value, bool | int | float | str | list):
            settings[name] = value
    return settings


def keypoint_names(dataset_meta: dict[str, Any]) -> list[str]:
    """Names of the keypoints, in the order of the outputs' second dimension."""
    names = dataset_meta.get('keypoint_id2name', {})
    return [names[index] for index in sorted(names)]
