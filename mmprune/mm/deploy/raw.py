"""A model's own outputs before any post-processing, for every family."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.mm.deploy.compiled import plain_masked_convs
from mmprune.mm.deploy.decisions import settled
from mmprune.mm.deploy.sparse import sparse_wrapper
from mmprune.mm.deploy.two_stage import traceable_rois, two_stage_wrapper
from mmprune.mm.models.classifier import ImageClassifier
from mmprune.surgery.meta import first_line


class RawNetwork(nn.Module):
    """Images (N, 3, H, W) -> every tensor of the model's ``mode='tensor'`` run, in its order, as
    ``output_0``, ``output_1`` and so on; of a classifier ``logits`` (N, classes).

    Of two-stage detectors whose RoIs can be exported: what the RPN gives on each level (scores, then
    offsets), the RoIs (N * k, 5) of its proposals, logits of their classes, and offsets to them. Of
    other models with an RPN: what that gives. Of models whose heads need more than images: what the
    first of them hands to its post-processing (``predict_by_feat``).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metadata = {'task': 'raw'}
        self.whole = two_stage_wrapper(model) or sparse_wrapper(model)
        self.run = of_images
        self.needs_samples = False
        if isinstance(model, ImageClassifier):
            self.output_names = ('logits',)

    def try_out(self, images: Tensor) -> None:
        """Finds out how the model can be run: on images alone, with data samples (DETR and its kin, for
        the sizes of their pictures; then it is exported for as many images as it is traced with), or
        the head alone where the rest asks for the objects of training (CondInst).

        Raises:
            PruneError: in none of these ways; with what the model says.
        """
        told = []
        if self.whole is not None:
            return
        model = self.model
        if hasattr(model, 'roi_head') and not hasattr(model, 'rpn_head'):
            raise PruneError(
                f'{type(model).__name__}: pools RoIs that it is given with each picture (it has no '
                'rpn_head), and a file here takes pictures alone'
            )
        ways = (of_images, of_samples, of_features)
        for run in (of_proposals, of_predict, *ways) if hasattr(model, 'rpn_head') else ways:
            self.run = run
            try:
                with torch.no_grad(), without_losses(model):
                    self(images)
            except Exception as error:  # of the model's own code
                told.append(f'{type(error).__name__}: {first_line(error)}')
            else:
                self.needs_samples = run in (of_samples, of_predict)
                return
        raise PruneError(
            f'{type(model).__name__}: does not run on images alone ({told[-3]}), nor with data '
            f'samples ({told[-2]}), nor does its head on features ({told[-1]})'
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.outputs(images)))

    def outputs(self, images: Tensor) -> Any:
        if self.whole is not None:
            return self.whole.before_nms(images)
        with contextlib.ExitStack() as stack:
            stack.enter_context(settled_choices())
            if not images.is_cuda:  # mmcv has none for the CPU
                stack.enter_context(plain_masked_convs())
            if hasattr(self.model, 'roi_head'):
                stack.enter_context(traceable_rois(self.model.roi_head))
            return self.run(self.model, images)


@contextlib.contextmanager
def settled_choices() -> Iterator[None]:
    """While it holds, the ``topk`` of a model, and whether two fractions are equal, are decisions.

    Two-stage transformers choose queries (Deformable DETR), and networks look for local maxima by
    comparing a map with its maximum pooled (SOLO), where neighbours may be near ties."""
    plain_equal, plain_topk, running = Tensor.__eq__, torch.topk, []

    def once(function: Callable, *args: Any) -> Any:
        running.append(True)  # the tracer's modes call what they find in its place again
        try:
            return function(*args)
        finally:
            running.clear()

    def equal(one: Tensor, other: Any) -> Any:
        if running or not isinstance(other, Tensor) or not one.is_floating_point():
            return plain_equal(one, other)
        return settled('equal', once(plain_equal, one, other), one, other)

    def topk(
        input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> torch.return_types.topk:
        if running:
            return plain_topk(input, k, dim, largest, sorted)
        found = once(plain_topk, input, k, dim, largest, sorted)
        scores, own = (x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in (input, found.indices))
        places = settled('the best', own, scores if largest else -scores)
        if places is own:
            return found
        shape = found.indices.movedim(dim, -1).shape
        places = places.reshape(shape).movedim(-1, dim)
        return torch.return_types.topk((input.gather(dim, places), places))

    with (
        mock.patch.object(Tensor, '__eq__', equal),
        mock.patch.object(Tensor, 'topk', topk),
        mock.patch.object(torch, 'topk', topk),
    ):
        yield


@contextlib.contextmanager
def without_losses(model: nn.Module) -> Iterator[None]:
    """While it holds, a head that computes losses fails: what asks for these is no inference."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PruneError(f'{type(model).__name__}: computes losses in this mode')

    with contextlib.ExitStack() as stack:
        for head in model.modules():
            if hasattr(head, 'loss_by_feat'):
                stack.enter_context(mock.patch.object(head, 'loss_by_feat', refuse))
        yield


def of_proposals(model: nn.Module, images: Tensor) -> Any:
    return model.rpn_head(model.extract_feat(images))


def of_images(model: nn.Module, images: Tensor) -> Any:
    return model(images, None, mode='tensor')


def of_samples(model: nn.Module, images: Tensor) -> Any:
    return model(images, samples_of(images), mode='tensor')


def of_features(model: nn.Module, images: Tensor) -> Any:
    return model.bbox_head(model.extract_feat(images))


class Handed(Exception):
    """What a head hands to its post-processing, on its way out of ``predict``."""


def of_predict(model: nn.Module, images: Tensor) -> Any:
    """What the first head that ``predict`` comes to hands to its post-processing."""

    def hand_out(*args: Any, **kwargs: Any) -> None:
        raise Handed(args)

    with contextlib.ExitStack() as stack:
        for head in model.modules():
            if hasattr(head, 'predict_by_feat'):
                stack.enter_context(mock.patch.object(head, 'predict_by_feat', hand_out))
        try:
            model.predict(images, samples_of(images))
        except Handed as handed:
            return handed.args
    raise PruneError(f'{type(model).__name__}: has no head with post-processing of its own')


class Sample(SimpleNamespace):
    """What a model reads of a data sample without objects. (mmdet's own class would copy the sizes,
    which may be symbols.)"""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


def samples_of(images: Tensor) -> list[Any]:
    """The data samples of (N, 3, H, W) images that fill their frames, without objects."""
    size = tuple(images.shape[-2:])
    about = dict(
        img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
    )
    nothing = InstanceData(bboxes=images.new_zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return [Sample(metainfo=about, gt_instances=nothing, **about) for _ in range(int(images.shape[0]))]
