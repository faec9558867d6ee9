"""A model's own outputs before any post-processing, for every family."""

from typing import Any

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmprune.runs import tensors_in


class RawNetwork(nn.Module):
    """Images (N, 3, H, W) -> every tensor of the model's ``mode='tensor'`` run, in its order, as
    ``output_0``, ``output_1`` and so on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'raw'}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(raw_outputs(self.model, images)))


def raw_outputs(model: nn.Module, images: Tensor) -> Any:
    """What the model gives for images and nothing else, or with what it asks for beside: the samples'
    sizes (DETR)."""
    return model(images, samples_of(images), mode='tensor')


def samples_of(images: Tensor) -> list[DetDataSample]:
    """A data sample for each of (N, 3, H, W) images that fill their frames."""
    size = tuple(images.shape[-2:])
    about = dict(
        img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )
    return [DetDataSample(metainfo=about) for _ in range(int(images.shape[0]))]
