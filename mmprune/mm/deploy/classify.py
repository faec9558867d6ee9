"""Classifiers: one network from the image to the probabilities of its classes."""

import torch
from torch import nn

from mmprune.mm.models.classifier import ImageClassifier


class ClassifierNetwork(nn.Module):
    """Images (N, 3, H, W) -> ``scores`` (N, classes): probabilities."""

    output_names = ('scores',)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'classification'}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).softmax(1)


def classifier_wrapper(model: nn.Module) -> nn.Module | None:
    """A module from images to scores; ``None`` if the model is no classifier."""
    return ClassifierNetwork(model) if isinstance(model, ImageClassifier) else None
