"""What the unpruned network teaches the pruned one: features, channel by channel, and predictions.

Both see the same images, and heads of regions the same regions. The teacher has the channels that the
student has lost; since a plan names those that are left, features need no layer between the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmprune.contexts import tensors_in
from mmprune.errors import PruneError
from mmprune.graph.sources import channel_sources
from mmprune.surgery.plan import Plan, plan_of

Losses = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Points:
    """Modules that are compared, by name.

    Args:
        features: whose outputs are features: the neck, or the backbone where there is none.
        dense: heads of detectors that score classes at every location by a sigmoid; their first output
            is a list of these, (N, anchors * classes, H, W) for each level.
        regions: heads that classify regions, and for each of them what pools these; the first output
            is (regions, classes).
        heatmaps: layers that make heatmaps, (N, K, H, W), and
        simcc: those that make scores of coordinates, (N, K, bins).
    """

    features: str
    dense: tuple[str, ...] = ()
    regions: tuple[tuple[str, str], ...] = ()
    heatmaps: tuple[str, ...] = ()
    simcc: tuple[str, ...] = ()

    @property
    def predictions(self) -> tuple[str, ...]:
        return (*self.dense, *(head for head, _ in self.regions), *self.heatmaps, *self.simcc)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.features, *self.predictions, *(extractor for _, extractor in self.regions))


def points_of(model: nn.Module) -> Points:
    """What can be compared in a detector of mmdet or a pose estimator of mmpose.

    Raises:
        PruneError: it has neither neck nor backbone, or no ``extract_feat``.
    """
    modules = dict(model.named_modules())
    features = next((name for name in ('neck', 'backbone') if name in modules), None)
    if features is None or not callable(getattr(model, 'extract_feat', None)):
        raise PruneError(
            f'distill: {type(model).__name__} has no neck or backbone that extract_feat runs, so '
            'there are no features to compare'
        )
    head = modules.get('bbox_head')
    scores = hasattr(head, 'cls_out_channels') and not hasattr(model, 'forward_transformer')
    dense = scores and getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
    extractors = {
        name: name.replace('bbox_head', 'bbox_roi_extractor')
        for name, module in modules.items()
        if name.startswith('roi_head.bbox_head') and hasattr(module, 'fc_cls')
    }
    regions = tuple(pair for pair in extractors.items() if pair[1] in modules)
    simcc = tuple(name for name in ('head.cls_x', 'head.cls_y') if name in modules)
    heatmaps = tuple(
        name
        for name in modules
        if name == 'head.final_layer' or name.rpartition('.')[0] == 'head.multi_final_layers'
    )
    if simcc:  # their final layer makes features
        heatmaps = ()
    return Points(features, ('bbox_head',) if dense else (), regions, heatmaps, simcc)


class Capture:
    """Keeps what modules take and return in one run of a model, while ``on``.

    Functions, and no bound methods, are the hooks: a copy of the model then does not copy this.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.on = False
        self.outputs: dict[str, list[Any]] = {}
        self.inputs: dict[str, list[tuple]] = {}
        modules = dict(model.named_modules())
        self._handles = [modules[name].register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def keep(module: nn.Module, args: tuple, out: Any) -> None:
            if self.on:
                self.outputs.setdefault(name, []).append(out)
                self.inputs.setdefault(name, []).append(args)

        return keep

    def start(self) -> None:
        self.outputs, self.inputs, self.on = {}, {}, True

    def stop(self) -> None:
        self.on = False

    def clear(self) -> None:
        self.outputs, self.inputs, self.on = {}, {}, False

    def close(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()


class Lesson:
    """Adds what the teacher has to say to the losses of a student: to those of one run with
    ``mode='loss'`` each time that this is ``armed``. Other runs (traces, checks) are left alone.

    Args:
        model: the student, pruned from
        teacher: the unpruned network, frozen.
        images: (N, 3, H, W), of any N: for a trace of the teacher.
        features: weight of the loss of features, times the amount of the model's own losses, and
        predictions: of the others (coordinates: times that amount, too); 0: without.
        temperature: that divides scores before their softmax.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        images: Any,
        features: float,
        predictions: float,
        temperature: float,
    ) -> None:
        points = points_of(model)
        self.points = points if predictions else Points(points.features)
        self.teacher, self.temperature = teacher, temperature
        self.features, self.predictions = features, predictions
        # RTMPose's distributions are softmaxes of ten times the scores.
        loss = getattr(getattr(model, 'head', None), 'loss_module', None)
        self.beta = getattr(loss, 'beta', 1.0)
        name = self.points.features
        run = lambda m: m.extract_feat(images)  # noqa: E731
        self.sources = channel_sources(teacher, run, [name])[name]
        self._kept: tuple[Plan | None, list[torch.Tensor | None]] | None = None
        self.armed = False
        self.student = Capture(model, self.points.names)
        self.taught = Capture(teacher, self.points.names)

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.armed and kwargs.get('mode') == 'loss':
                self.armed = False
                self.student.start()

        def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], losses: Any) -> Any:
            if not self.student.on:
                return None
            self.student.stop()
            self._teach(kwargs['inputs'] if 'inputs' in kwargs else args[0])
            try:
                # What the model loses itself is the unit: that of heatmaps is a thousand times smaller
                # than that of boxes, and a fixed weight would be the whole of what it is trained on.
                own = module.parse_losses(losses)[0].detach().abs()  # log likelihoods go below 0
                return dict(losses) | self.losses(module, own)
            finally:
                self.student.clear()
                self.taught.clear()

        self._handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, with_kwargs=True),
        ]

    def close(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()
        self.student.close()
        self.taught.close()

    @torch.no_grad()
    def _teach(self, images: Any) -> None:
        """Runs the teacher on what the student was run on: its features, its heads, and its regions."""
        self.taught.start()
        modules = dict(self.teacher.named_modules())
        features = self.teacher.extract_feat(images)
        for name in self.points.dense:
            modules[name](features)
        for head, extractor in self.points.regions:
            stage = head.removeprefix('roi_head.bbox_head').strip('.')
            for _, regions, *_ in self.student.inputs.get(extractor, ()):
                modules['roi_head']._bbox_forward(*((int(stage),) if stage else ()), features, regions)
        if self.points.heatmaps or self.points.simcc:
            modules['head'](features)
        self.taught.stop()

    def losses(self, model: nn.Module, own: torch.Tensor) -> Losses:
        """What is added to the model's own losses, the amount of whose sum is ``own``, a scalar."""
        found = {}
        if self.features:
            name = self.points.features
            both = (tensors_in(run.outputs[name]) for run in (self.student, self.taught))
            each = [
                feature_loss(one, other, source.dim if source.dim is not None else 1, kept)
                for one, other, source, kept in zip(*both, self.sources, self.kept(model), strict=True)
            ]
            found[f'loss_distill_{name}'] = self.features * own * torch.stack(each).mean()
        for kind, losses in self._predictions().items():
            unit = own if kind == 'simcc' else 1
            found[f'loss_distill_{kind}'] = self.predictions * unit * torch.stack(losses).mean()
        return found

    def kept(self, model: nn.Module) -> list[torch.Tensor | None]:
        """The teacher's channels that the student has, for each tensor of features."""
        plan = plan_of(model)
        if self._kept is None or self._kept[0] is not plan:
            device = next(model.parameters()).device
            each = [source.kept(plan.keep if plan is not None else {}) for source in self.sources]
            kept = [None if k is None else torch.from_numpy(k).to(device) for k in each]
            self._kept = plan, kept
        return self._kept[1]

    def _predictions(self) -> dict[str, list[torch.Tensor]]:
        """The losses of all heads, by kind."""
        found: dict[str, list[torch.Tensor]] = {}

        def compare(kind: str, name: str, loss: Callable[[Any, Any], torch.Tensor]) -> None:
            runs = (run.outputs.get(name, ()) for run in (self.student, self.taught))
            found.setdefault(kind, []).extend(
                loss(one, other) for one, other in zip(*runs, strict=True)
            )

        def softmax(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return softmax_loss(student, teacher, self.temperature)

        for name in self.points.dense:
            compare('cls', name, lambda one, other: dense_loss(_flat(one[0]), _flat(other[0])))
        for name, _ in self.points.regions:
            compare('cls', name, lambda one, other: softmax(one[0], other[0]))
        for name in self.points.heatmaps:
            compare('heatmap', name, functional.mse_loss)
        for name in self.points.simcc:
            compare('simcc', name, lambda one, other: softmax(self.beta * one, self.beta * other))
        return {kind: losses for kind, losses in found.items() if losses}


def _flat(levels: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([scores.flatten() for scores in levels])


def feature_loss(
    student: torch.Tensor, teacher: torch.Tensor, dim: int, kept: torch.Tensor | None
) -> torch.Tensor:
    """Mean over channels of 1 - r, the correlation over images and positions (Cao et al., *PKD: General
    Distillation Framework for Object Detectors via Pearson Correlation Coefficient*, NeurIPS 2022).

    Args:
        student: features, with channels on ``dim``, (N, C', H, W), say.
        teacher: those of the unpruned network, (N, C, H, W).
        kept: (C',) the indices of the teacher's channels that the student has; ``None``: all.
    """
    if kept is not None:
        teacher = teacher.index_select(dim, kept)
    one, other = (
        functional.layer_norm(flat, flat.shape[1:])
        for flat in (t.float().movedim(dim, 0).flatten(1) for t in (student, teacher))
    )
    return 0.5 * functional.mse_loss(one, other)


def dense_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How far class scores at all locations, of any shape before their sigmoid, are from the teacher's:
    the quality focal loss (Li et al., *Generalized Focal Loss*, NeurIPS 2020, with beta = 2) with the
    teacher's scores as targets, summed, for one object (by the sum of the teacher's scores)."""
    student, target = student.float(), teacher.float().sigmoid()
    cross = functional.binary_cross_entropy_with_logits(student, target, reduction='none')
    apart = (student.detach().sigmoid() - target).square()
    return (apart * cross).sum() / target.sum().clamp(min=1)


def softmax_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of distributions on the last dimension at a temperature (Hinton et
    al., 2015), the mean over all others; 0 where there are none."""
    logs = [functional.log_softmax(t.float() / temperature, -1) for t in (student, teacher)]
    divergence = functional.kl_div(*logs, reduction='none', log_target=True).sum(-1)
    return divergence.sum() / max(divergence.numel(), 1) * temperature**2
