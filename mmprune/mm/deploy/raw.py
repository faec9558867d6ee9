"""A model's outputs before any post-processing, for every family."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmprune.budget.runtimes import Prepare, loaded
from mmprune.contexts import evaluating, tensors_in, unchanged
from mmprune.errors import PruneError
from mmprune.mm.deploy.patches import (
    cpu_masked_convs,
    stopped_at,
    traceable_rois,
    without_losses,
)
from mmprune.mm.deploy.tracing import OPSETS, to_onnx
from mmprune.mm.deploy.two_stage import two_stage_network
from mmprune.mm.models.classifier import ImageClassifier
from mmprune.surgery.meta import first_line


class RawNetwork(nn.Module):
    """Images (N, 3, H, W) to every tensor of the model's ``mode='tensor'`` run, in order: ``output_0``,
    ``output_1`` and so on. A classifier has one output, ``logits`` (N, classes).

    Three kinds of detectors give something else:

    - a two-stage detector that can be exported whole: the RPN's scores and offsets on each level, then
      the RoIs (N * k, 5), the logits of their classes, and the offsets to them;
    - another model with an RPN: the RPN's outputs;
    - a model whose heads need more than images: what the first of them hands to its post-processing
      (``predict_by_feat``).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'raw'}
        self.two_stage = two_stage_network(model)
        self.run = on_images
        self.needs_samples = False
        if isinstance(model, ImageClassifier):
            self.output_names = ('logits',)

    def try_out(self, images: Tensor) -> None:
        """Finds a way to run the model: on images alone, with data samples (DETR and its kin read the
        sizes of pictures from them; such a model is exported for a fixed number of images), or the head
        alone (CondInst asks for the objects of training elsewhere).

        Args:
            images: (N, 3, H, W) to try it on.

        Raises:
            PruneError: the model runs in none of these ways. The message quotes the model's errors.
        """
        if self.two_stage is not None:
            return
        model = self.model
        if hasattr(model, 'roi_head') and not hasattr(model, 'rpn_head'):
            raise PruneError(
                f'{type(model).__name__}: pools RoIs that it is given with each picture (it has no '
                'rpn_head), and a file here takes pictures alone'
            )
        errors = []
        ways = (on_images, on_samples, on_features)
        for run in (on_rpn, up_to_predict_by_feat, *ways) if hasattr(model, 'rpn_head') else ways:
            self.run = run
            try:
                with torch.no_grad(), without_losses(model):
                    self(images)
            except Exception as error:  # the model's own code may raise anything
                errors.append(f'{type(error).__name__}: {first_line(error)}')
            else:
                self.needs_samples = run in (on_samples, up_to_predict_by_feat)
                return
        raise PruneError(
            f'{type(model).__name__}: does not run on images alone ({errors[-3]}), nor with data '
            f'samples ({errors[-2]}), nor does its head on features ({errors[-1]})'
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.two_stage is not None:
            return tuple(tensors_in(self.two_stage.raw_outputs(images)))
        with contextlib.ExitStack() as stack:
            if not images.is_cuda:
                stack.enter_context(cpu_masked_convs())
            if hasattr(self.model, 'roi_head'):
                stack.enter_context(traceable_rois(self.model.roi_head))
            return tuple(tensors_in(self.run(self.model, images)))


def prepare_raw(size: tuple[int, int], backend: str) -> Prepare:
    """How a model is made ready to be timed without its post-processing, in the runtime that it will be
    deployed on.

    Args:
        size: height and width of the one image that is run.
        backend: ``'eager'``, ``'onnxruntime'`` or ``'openvino'``.

    Raises:
        PruneError: raised by the function that is returned, if the model cannot be exported.
    """
    images = torch.zeros(1, 3, *size)

    def prepare(model: nn.Module) -> Callable[[], Any]:
        network = RawNetwork(model)
        with unchanged(model), evaluating(model), torch.no_grad():
            network.eval().try_out(images)
            if backend == 'eager':
                return lambda: network(images)
            graph = to_onnx(network, images, {}, OPSETS[0]).model_proto
        feed = {graph.graph.input[0].name: images.numpy()}
        return loaded(graph.SerializeToString(), feed, backend)

    return prepare


# -- ways to run a model, each a function of the model and images (N, 3, H, W) ---------------------


def on_images(model: nn.Module, images: Tensor) -> Any:
    return model(images, None, mode='tensor')


def on_samples(model: nn.Module, images: Tensor) -> Any:
    return model(images, samples_of(images), mode='tensor')


def on_features(model: nn.Module, images: Tensor) -> Any:
    return model.bbox_head(model.extract_feat(images))


def on_rpn(model: nn.Module, images: Tensor) -> Any:
    return model.rpn_head(model.extract_feat(images))


def up_to_predict_by_feat(model: nn.Module, images: Tensor) -> Any:
    """What the first head that ``predict`` reaches hands to its post-processing."""
    with stopped_at(model.modules(), 'predict_by_feat') as arguments:
        model.predict(images, samples_of(images))
        raise PruneError(f'{type(model).__name__}: has no head whose predict ends in predict_by_feat')
    return arguments


class Sample(SimpleNamespace):
    """A data sample without objects. mmdet's own class would copy the sizes, which may be symbols of a
    trace."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


def samples_of(images: Tensor) -> list[Any]:
    """Data samples of (N, 3, H, W) images without padding and without objects."""
    size = tuple(images.shape[-2:])
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape', 'pad_shape'), size)
    meta['scale_factor'] = (1.0, 1.0)
    nothing = InstanceData(bboxes=images.new_zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return [Sample(metainfo=meta, gt_instances=nothing, **meta) for _ in range(int(images.shape[0]))]
