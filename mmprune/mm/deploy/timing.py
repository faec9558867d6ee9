"""Networks of OpenMMLab, made ready to be timed in the runtime that they are deployed on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmprune.budget.runtimes import Prepare, loaded
from mmprune.contexts import evaluating, unchanged
from mmprune.mm.deploy.graph import OPSETS, to_onnx
from mmprune.mm.deploy.raw import RawNetwork


def prepare_raw(size: tuple[int, int], backend: str) -> Prepare:
    """How a model is made ready: one image of ``size`` (height, width) through all but post-processing,
    as :class:`RawNetwork` exports it.

    Args:
        backend: ``'eager'``, ``'onnxruntime'`` or ``'openvino'``.

    Raises:
        PruneError: by the function that is returned: the model can't be exported.
    """
    images = torch.zeros(1, 3, *size)

    def prepare(model: nn.Module) -> Callable[[], Any]:
        network = RawNetwork(model)
        with unchanged(model), evaluating(model), torch.no_grad():
            network.eval().try_out(images)
            if backend == 'eager':
                return lambda: network(images)
            program = to_onnx(network, images, {}, OPSETS[0])
        content = program.model_proto
        feed = {content.graph.input[0].name: images.numpy()}
        return loaded(content.SerializeToString(), feed, backend)

    return prepare
