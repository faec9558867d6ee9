"""Networks without boxes for export: top-down pose estimators and classifiers.

Heatmaps and SimCC vectors are decoded outside the file (the maximum, its refinement, flips). The
decoding takes a few lines of numpy, and runtimes such as rtmlib and that of mmdeploy contain it.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.mm.deploy.patches import stopped_at
from mmprune.mm.models.classifier import ImageClassifier

OUTPUTS = {'heatmap': ('heatmaps',), 'simcc': ('simcc_x', 'simcc_y')}
"""{kind of head: names of the outputs}. Heatmaps are (N, K, h, w); SimCC vectors are (N, K, Wx) and
(N, K, Wy)."""


class ClassifierNetwork(nn.Module):
    """Maps images (N, 3, H, W) to ``scores`` (N, classes), which are probabilities."""

    output_names = ('scores',)

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'classification'}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).softmax(1)


class PoseNetwork(nn.Module):
    """Maps images (N, 3, H, W) to ``heatmaps`` (N, K, h, w), or to ``simcc_x`` (N, K, Wx) and
    ``simcc_y`` (N, K, Wy). If the network has several stages, the outputs are those of the last one.

    Args:
        model: a top-down pose estimator. Its codec determines the attribute ``input_size``, (height,
            width).
        kind: the kind of the model's head, a key of ``OUTPUTS``.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.output_names = OUTPUTS[kind]
        self.metadata = {'task': 'pose', 'codec': codec_of(model.head.decoder)}
        width, height = model.head.decoder.input_size
        self.input_size = (int(height), int(width))

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model.head.forward(self.model.extract_feat(images))
        if self.kind == 'simcc':
            return outputs[0], outputs[1]
        return outputs if isinstance(outputs, torch.Tensor) else outputs[-1]

    def given_to_codec(self, images: torch.Tensor) -> Any:
        """Returns the tensors that the model's own ``predict`` decodes: heatmaps, or a pair of SimCC
        vectors. The check compares the outputs of ``forward`` with them."""
        head = self.model.head
        with stopped_at([head], 'decode') as arguments:
            head.predict(self.model.extract_feat(images), [], test_cfg={})
        return arguments[0]


def classifier_network(model: nn.Module) -> nn.Module | None:
    """Returns the network to export in the place of a classifier; ``None`` for other models."""
    return ClassifierNetwork(model) if isinstance(model, ImageClassifier) else None


def pose_network(model: nn.Module) -> PoseNetwork | None:
    """Returns the network to export in the place of a top-down pose estimator with a heatmap or SimCC
    head; ``None`` for other models.

    Raises:
        PruneError: the head has no decoder, so nothing defines how its outputs become keypoints.
    """
    # If mmpose was not imported, the model cannot be one of its models.
    if 'mmpose.models' not in sys.modules:
        return None
    from mmpose.models import TopdownPoseEstimator

    head = getattr(model, 'head', None)
    head_type = head_kind(head)
    if not isinstance(model, TopdownPoseEstimator) or head_type is None:
        return None
    if getattr(head, 'decoder', None) is None:
        raise PruneError(
            f'head ({type(head).__name__}): has no decoder; add decoder=codec to model.head in the '
            'config'
        )
    return PoseNetwork(model, head_type).eval()


def head_kind(head: nn.Module | None) -> str | None:
    """Returns ``'heatmap'`` or ``'simcc'``, or ``None`` for a head that gives neither."""
    from mmpose.models import heads

    if isinstance(head, heads.RTMCCHead | heads.SimCCHead | heads.RTMWHead):
        return 'simcc'
    # Heatmaps of associative embedding can only be used with its second output, the tags.
    if isinstance(head, heads.AssociativeEmbeddingHead):
        return None
    return 'heatmap' if isinstance(head, heads.HeatmapHead | heads.CPMHead | heads.MSPNHead) else None


def gives_stages(head: nn.Module) -> bool:
    """Returns whether a heatmap head returns a list with a tensor for each stage."""
    from mmpose.models import heads

    return isinstance(head, heads.CPMHead | heads.MSPNHead)


def codec_of(decoder: Any) -> dict[str, Any]:
    """Describes a codec as plain data: the name of its class as ``type``, and its settings. Sizes are
    (width, height)."""
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
    """Returns the names of the keypoints, in the order of the outputs' second dimension."""
    names = dataset_meta.get('keypoint_id2name', {})
    return [names[index] for index in sorted(names)]
