"""torchvision's classifiers, and any other network, for mmengine's Runner."""

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

OWN = {'resnet_v2': ResNetV2}
AUX_WEIGHT = {'Inception3': 0.4, 'GoogLeNet': 0.3}
"""Weight of the auxiliary classifiers' losses, as in torchvision's recipes."""


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A classification network with mmengine's three modes.

    ``net``: ``dict(name=...)`` with further arguments of the network; a name that
    ``torchvision.models.get_model`` knows, or ``resnet_v2``. ``num_classes`` goes to it too. A tuple
    of outputs is what networks with auxiliary heads give in training: the main one comes first.

    ``mode='tensor'``: class scores (N, num_classes), or all outputs of such a network;
    ``'loss'``: ``loss``, ``loss_aux`` where there are such heads, and ``acc``, in percent;
    ``'predict'``: the data samples with ``pred_score``, (num_classes,) probabilities.
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
        out = self.net(inputs)
        if mode == 'tensor':
            return out
        scores, *others = out if isinstance(out, tuple) else (out,)
        if mode == 'loss':
            return self.loss(scores, [o for o in others if o is not None], data_samples)
        if mode == 'predict':
            for sample, score in zip(data_samples, scores.softmax(1), strict=True):
                sample.set_field(score, 'pred_score')
            return data_samples
        raise PruneError(f"mode={mode!r}: one of 'tensor', 'loss', 'predict'")

    def loss(self, scores: Tensor, others: list[Tensor], samples: Sequence) -> dict[str, Tensor]:
        """Cross entropy of all outputs, and the main one's accuracy."""
        labels = torch.tensor([sample.gt_label for sample in samples], device=scores.device)
        losses = {'loss': F.cross_entropy(scores, labels, label_smoothing=self.label_smooth)}
        if others:
            losses['loss_aux'] = self.aux_weight * sum(
                F.cross_entropy(other, labels, label_smoothing=self.label_smooth) for other in others
            )
        losses['acc'] = 100 * (scores.argmax(1) == labels).float().mean()
        return losses


def make_net(name: str, **arguments: Any) -> nn.Module:
    """A network by its name, with random weights unless ``weights`` says otherwise."""
    if name in OWN:
        return OWN[name](**arguments)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise PruneError(
            f'net name={name!r}: give one of {", ".join(OWN)}, or a classifier of torchvision.models '
            "('alexnet', 'vgg16_bn', 'mobilenet_v2' ...)"
        )
    if name in ('inception_v3', 'googlenet'):
        arguments.setdefault('init_weights', True)  # its default, but unsaid it warns
    return torchvision.models.get_model(name, **arguments)
