"""Classification networks for mmengine's Runner: those of torchvision, and ResNet V2."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn import functional as F

from mmprune.errors import PruneError
from mmprune.mm.models.resnet_v2 import ResNetV2

AUX_WEIGHT = {'Inception3': 0.4, 'GoogLeNet': 0.3}
"""{class of a network: weight of the losses of its auxiliary classifiers}, as in torchvision's training
recipes."""


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A classification network with mmengine's three modes.

    Args:
        net: the arguments of :func:`make_net`, such as ``dict(name='resnet18')``.
        num_classes: the number of classes, which is passed to the network, too.
        label_smooth: the label smoothing of the loss, from 0 to 1.
        data_preprocessor: mmengine's config of the preprocessor. The default is
            ``ImgDataPreprocessor``.
        init_cfg: mmengine's config of the initialization.
    """

    def __init__(
        self,
        net: Mapping[str, Any],
        num_classes: int,
        label_smooth: float = 0.0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            data_preprocessor=data_preprocessor or dict(type='ImgDataPreprocessor'), init_cfg=init_cfg
        )
        self.net = make_net(**net, num_classes=num_classes)
        self.num_classes = num_classes
        self.label_smooth = label_smooth
        self.aux_weight = AUX_WEIGHT.get(type(self.net).__name__, 1.0)

    def forward(
        self,
        inputs: Tensor,
        data_samples: Sequence[BaseDataElement] | None = None,
        mode: str = 'tensor',
    ) -> Any:
        """Runs the network.

        Args:
            inputs: images (N, 3, H, W).
            data_samples: N samples with ``gt_label``. The mode ``'tensor'`` does not use them.
            mode: ``'tensor'``, ``'loss'`` or ``'predict'``.

        Returns:
            In the mode ``'tensor'`` the output of the network: class scores (N, num_classes), or a
            tuple of these and of the scores of auxiliary classifiers. In the mode ``'loss'`` the
            dictionary of :meth:`loss`. In the mode ``'predict'`` the samples, with the probabilities
            ``pred_score`` (num_classes,).

        Raises:
            PruneError: the mode is unknown.
        """
        out = self.net(inputs)
        if mode == 'tensor':
            return out
        scores, *aux_scores = out if isinstance(out, tuple) else (out,)
        if mode == 'loss':
            return self.loss(scores, [aux for aux in aux_scores if aux is not None], data_samples)
        if mode == 'predict':
            for sample, score in zip(data_samples, scores.softmax(1), strict=True):
                sample.set_field(score, 'pred_score')
            return data_samples
        raise PruneError(f"mode={mode!r}: one of 'tensor', 'loss', 'predict'")

    def loss(self, scores: Tensor, aux_scores: list[Tensor], samples: Sequence) -> dict[str, Tensor]:
        """Computes the cross entropy of all classifiers, and the accuracy (%) of the main one."""
        labels = torch.tensor([sample.gt_label for sample in samples], device=scores.device)
        losses = {'loss': F.cross_entropy(scores, labels, label_smoothing=self.label_smooth)}
        if aux_scores:
            losses['loss_aux'] = self.aux_weight * sum(
                F.cross_entropy(aux, labels, label_smoothing=self.label_smooth) for aux in aux_scores
            )
        losses['acc'] = 100 * (scores.argmax(1) == labels).float().mean()
        return losses


def make_net(name: str, **arguments: Any) -> nn.Module:
    """Builds a classification network.

    Args:
        name: the name of a classifier in ``torchvision.models``, or ``'resnet_v2'``.
        arguments: further arguments of the network. Without the argument ``weights``, the weights are
            random.

    Raises:
        PruneError: there is no classifier of this name.
    """
    if name == 'resnet_v2':
        return ResNetV2(**arguments)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise PruneError(
            f'net name={name!r}: give resnet_v2, or a classifier of torchvision.models '
            "('alexnet', 'vgg16_bn', 'mobilenet_v2' ...)"
        )
    if name in ('inception_v3', 'googlenet'):
        arguments.setdefault('init_weights', True)  # the default, but torchvision warns without it
    return torchvision.models.get_model(name, **arguments)
