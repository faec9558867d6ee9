"""A model's own outputs before any post-processing, for every family."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.mm.deploy.two_stage import TwoStageNetwork, two_stage_wrapper
from mmprune.surgery.meta import first_line


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
        self.run = of_images
        self.needs_samples = False

    def try_out(self, images: Tensor) -> None:
        """Finds out how the model can be run: on images alone, with data samples (DETR and its kin, for
        the sizes of their pictures; then it is exported for as many images as it is traced with), or
        the head alone where the rest asks for the objects of training (CondInst).

        Raises:
            PruneError: in none of these ways; with what the model says.
        """
        told = []
        if isinstance(self.two_stage, TwoStageNetwork):
            return
        ways = (of_images, of_samples, of_features)
        for run in (of_proposals, *ways) if hasattr(self.model, 'rpn_head') else ways:
            self.run = run
            try:
                with torch.no_grad():
                    self(images)
            except Exception as error:  # of the model's own code
                told.append(f'{type(error).__name__}: {first_line(error)}')
            else:
                self.needs_samples = run is of_samples
                return
        raise PruneError(
            f'{type(self.model).__name__}: does not run on images alone ({told[0]}), nor with data '
            f'samples ({told[-2]}), nor does its head on features ({told[-1]})'
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.outputs(images)))

    def outputs(self, images: Tensor) -> Any:
        if isinstance(self.two_stage, TwoStageNetwork):
            return self.two_stage.before_nms(images)
        return self.run(self.model, images)


def of_proposals(model: nn.Module, images: Tensor) -> Any:
    return model.rpn_head(model.extract_feat(images))


def of_images(model: nn.Module, images: Tensor) -> Any:
    return model(images, None, mode='tensor')


def of_samples(model: nn.Module, images: Tensor) -> Any:
    return model(images, samples_of(images), mode='tensor')


def of_features(model: nn.Module, images: Tensor) -> Any:
    return model.bbox_head(model.extract_feat(images))


def samples_of(images: Tensor) -> list[Any]:
    """What a transformer reads of the data samples of (N, 3, H, W) images that fill their frames.
    (mmdet's own class would copy the sizes, which may be symbols.)"""
    size = tuple(images.shape[-2:])
    about = dict(
        img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )
    return [SimpleNamespace(metainfo=about, **about) for _ in range(int(images.shape[0]))]
