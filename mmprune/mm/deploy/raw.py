"""Runs a model of any family without its post-processing, for exports with ``--raw`` and for timing."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmprune.budget.runtimes import Prepare, loaded
from mmprune.contexts import evaluating, unchanged
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
from mmprune.nested import tensors_in
from mmprune.surgery.meta import first_line


class RawNetwork(nn.Module):
    """Maps images (N, 3, H, W) to the tensors that the model returns for ``mode='tensor'``, in order.

    An exported file names them ``output_0``, ``output_1`` and so on. A classifier has one output,
    ``logits`` (N, classes). Three kinds of detectors return other tensors:

    - a two-stage detector that can be exported whole: the RPN's scores and offsets on each level, then
      the RoIs (N * k, 5), the logits of their classes, and their box offsets;
    - another model with an RPN: the RPN's outputs;
    - a model whose heads need more than images: the arguments with which the first of them calls its
      post-processing (``predict_by_feat``).
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
        """Finds a way in which the model runs, and keeps it as ``run``.

        A model with an RPN is first tried with the RPN alone, then with ``predict`` up to its
        post-processing. Then these ways are tried on every model:

        - ``mode='tensor'`` on images alone;
        - ``mode='tensor'`` with data samples, from which DETR and related models read the sizes of the
          pictures (such a model is exported for a fixed number of images);
        - the head alone on features, for models such as CondInst, whose ``mode='tensor'`` needs
          annotated objects.

        Args:
            images: (N, 3, H, W) images on which the ways are tried.

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
        # The last three errors are those of ``ways``, whether or not the model has an RPN.
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
    """Returns a function that prepares a model for timing without its post-processing, in the runtime
    that the model will be deployed on.

    Args:
        size: (height, width) in pixels of the single image that the timed model gets.
        backend: ``'eager'``, ``'onnxruntime'`` or ``'openvino'``.

    Raises:
        PruneError: the model cannot be run or exported. The returned function raises it.
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


# -- ways to run a model: functions of the model and images (N, 3, H, W) ---------------------------


def on_images(model: nn.Module, images: Tensor) -> Any:
    return model(images, None, mode='tensor')


def on_samples(model: nn.Module, images: Tensor) -> Any:
    return model(images, samples_of(images), mode='tensor')


def on_features(model: nn.Module, images: Tensor) -> Any:
    return model.bbox_head(model.extract_feat(images))


def on_rpn(model: nn.Module, images: Tensor) -> Any:
    return model.rpn_head(model.extract_feat(images))


def up_to_predict_by_feat(model: nn.Module, images: Tensor) -> Any:
    """The arguments with which the first head in ``predict`` calls its post-processing."""
    with stopped_at(model.modules(), 'predict_by_feat') as arguments:
        model.predict(images, samples_of(images))
        # ``stopped_at`` ends the block at the first call, so here there was none.
        raise PruneError(f'{type(model).__name__}: has no head whose predict ends in predict_by_feat')
    return arguments


class Sample(SimpleNamespace):
    """Replaces mmdet's data sample, which would copy the sizes. In an export these may be symbolic."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


def samples_of(images: Tensor) -> list[Any]:
    """A data sample for each of (N, 3, H, W) images, which have no padding and no annotated objects."""
    size = tuple(images.shape[-2:])
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape', 'pad_shape'), size)
    meta['scale_factor'] = (1.0, 1.0)
    no_objects = InstanceData(bboxes=images.new_zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return [Sample(metainfo=meta, gt_instances=no_objects, **meta) for _ in range(int(images.shape[0]))]
