"""A model's own outputs before any post-processing, for every family."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmprune.contexts import tensors_in
from mmprune.mm.deploy.two_stage import TwoStageNetwork, two_stage_wrapper


class RawNetwork(nn.Module):
    """Images (N, 3, H, W) -> every tensor of the model's ``mode='tensor'`` run, in its order, as
    ``output_0``, ``output_1`` and so on.

    Of two-stage detectors whose RoIs can be exported: what the RPN gives on each level (scores, then
    offsets), the RoIs (N * k, 5) of its proposals, logits of their classes, and offsets to them. Of
    other models with an RPN: what that gives.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'raw'}
        self.two_stage = two_stage_wrapper(model)
        self.needs_samples = False

    def try_out(self, images: Tensor) -> None:
        """Finds out whether the model asks for data samples (DETR and its kin, for the sizes of their
        pictures): then it is exported for as many images as it is traced with."""
        with torch.no_grad():
            try:
                self(images)
            except (TypeError, AttributeError, AssertionError):
                self.needs_samples = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.outputs(images)))

    def outputs(self, images: Tensor) -> Any:
        model = self.model
        if isinstance(self.two_stage, TwoStageNetwork):
            return self.two_stage.before_nms(images)
        if hasattr(model, 'rpn_head'):
            return model.rpn_head(model.extract_feat(images))
        if self.needs_samples:
            return model(images, samples_of(images), mode='tensor')
        return model(images, None, mode='tensor')


def samples_of(images: Tensor) -> list[Any]:
    """What a transformer reads of the data samples of (N, 3, H, W) images that fill their frames.
    (mmdet's own class would copy the sizes, which may be symbols.)"""
    size = tuple(images.shape[-2:])
    about = dict(
        img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )
    return [SimpleNamespace(metainfo=about, **about) for _ in range(int(images.shape[0]))]
