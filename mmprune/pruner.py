"""Pruning in any training loop, in a few lines."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune import defaults
from mmprune.api import runs_in, runs_to_check, trace, unseen_by
from mmprune.budget.budget import Budget, make_budget, own_options
from mmprune.contexts import Forward, consumed, unchanged
from mmprune.distributed import all_gather, check_rebuildable, is_distributed
from mmprune.errors import PruneError, did_you_mean
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import aliases_of
from mmprune.graph.unseen import untouched_parameters
from mmprune.nested import tensors_in
from mmprune.score import Score, make_score
from mmprune.score.collector import Collector
from mmprune.session import CutContext, cut_once
from mmprune.surgery.build import remaining
from mmprune.surgery.meta import plan_in, read_file
from mmprune.surgery.parts import innermost, unwrapped_in_steps
from mmprune.surgery.plan import Plan, plan_of
from mmprune.surgery.structure import fingerprint, shape_text

ToLoss = Callable[[nn.Module, Any], Any]
"""Runs the model on a batch, ``to_loss_fn(model, batch)``, and returns a loss or outputs."""


@dataclass(frozen=True)
class PruneResult:
    """The result of one call of :meth:`Pruner.rebuild_model`.

    Args:
        units: number of units that were removed.
        channels: {weight: (output channels before, after)} of the layers that became narrower.
        flops: multiply-adds of one forward of the pruned model.
        params: number of parameters of the pruned model.
        keep_flops: ``flops`` as a fraction of the unpruned model's.
        keep_params: ``params`` as a fraction of the unpruned model's.
        iterations: number of training steps over which units were scored; 1 if they were scored only on
            the batch of the call, 0 if the criterion needs only weights.
        unscored: {reason why units could not be scored: number of units}.
        plan: the plan of only this cut, which can be applied to copies of the model
            (``result.plan.apply(copy)``); ``None`` if nothing was removed. :func:`mmprune.plan_of`
            gives all cuts of the model as one plan.
    """

    units: int
    channels: dict[str, tuple[int, int]]
    flops: int
    params: int
    keep_flops: float
    keep_params: float
    iterations: int
    unscored: dict[str, int] = field(default_factory=dict)
    plan: Plan | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return (
            f'removed {self.units} units in {len(self.channels)} layers after {self.iterations} '
            f'iterations; left: {self.flops:,} FLOPs ({self.keep_flops:.1%}), '
            f'{self.params:,} parameters ({self.keep_params:.1%})'
        )


class Pruner:
    """Scores the units of a model in the training steps of any loop, and removes some at each call.

    ::

        pruner = mmprune.Pruner(model)
        for it, batch in enumerate(loader):
            if (it + 1) % prune_freq == 0:
                print(pruner.rebuild_model(batch, to_loss_fn, optimizer, prune_num))
                continue
            ...  # forward, backward, optimizer.step() as ever

    The model is traced at its first forward pass in training mode, and scored from the next step of any
    optimizer that holds its weights. The first call of :meth:`rebuild_model` traces it once more, with
    the loss.

    Args:
        model: the model, or a wrapper around it (``torch.compile``, ``DataParallel``). The module
            inside the wrapper is cut in place, and is what :meth:`rebuild_model` passes to
            ``to_loss_fn``.
        distributed: whether the loop runs in several processes, with ``model`` in
            DistributedDataParallel or with gradients that the loop averages. All processes must call
            :meth:`rebuild_model` at the same step. They cut the same units, or none of them cuts.
        also: further runs of the model (``lambda model: model(x, task='depth')``) for modules that the
            loss does not use. Cuts are checked on these runs too.
        ema_models: averaged copies of the model (``torch.optim.swa_utils.AveragedModel``, or plain
            modules), which are cut in the same way.
        budget: a :class:`Budget` or a dict of its options, in place of ``options``.
        score: a criterion's name, a :class:`Score`, or a dict of its options.
        check: whether to compare each cut with the masked model before it is kept.
        strict: whether to raise an error if a cut fails the check, or if no run uses a module.
            Otherwise both are warnings: the groups of channels that are to blame are locked, and the
            others are cut.
        compensate: whether to change the kept weights by least squares on the batch of each call, so
            that they compensate for the removed channels (:mod:`mmprune.compensation`).
        options: the options of :class:`Budget` except ``prune_num``: limits such as ``min_channels``,
            ``divisor`` and ``lock``, and targets such as ``keep_flops``, below which no unit is
            removed.

    Raises:
        PruneError: bad options, ``budget`` beside its options, or a wrapper that cannot follow a cut.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> pruner = mmprune.Pruner(model, divisor=1)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 3)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> to_loss = lambda model, batch: model(batch).square().mean()
        >>> done = pruner.rebuild_model(torch.randn(4, 3), to_loss, optimizer, prune_num=3)
        >>> done.units, done.channels
        (3, {'0.weight': (8, 5)})
        >>> pruner.close()
    """

    def __init__(
        self,
        model: nn.Module,
        distributed: bool = False,
        *,
        also: Forward | Iterable[Forward] = (),
        ema_models: nn.Module | Iterable[nn.Module] = (),
        budget: Budget | Mapping[str, Any] | None = None,
        score: str | Mapping[str, Any] | Score = defaults.PRUNER.score,
        check: bool = True,
        strict: bool = False,
        compensate: bool = defaults.PRUNER.compensate,
        **options: Any,
    ) -> None:
        nesting = unwrapped_in_steps(model)  # the outermost wrapper first, the bare model last
        parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        if any(isinstance(level, parallel[0]) for level in nesting) and not distributed:
            raise PruneError(
                'the model is in DistributedDataParallel and distributed=False: say '
                'Pruner(model, distributed=True), in every process'
            )
        check_rebuildable(model)
        self.limits = _limits(budget, options)
        self.score = make_score(score)
        self.model = nesting[-1]
        averages = [ema_models] if isinstance(ema_models, nn.Module) else ema_models
        self.also, self.check, self.compensate = runs_in(also), check, compensate
        self._context = CutContext(
            self.model,
            wrapper=model,
            ema_models=list(map(innermost, averages)),
            per=self.score.per,
            distributed=distributed and is_distributed(),
            strict=strict,
        )
        self._graph: ChannelGraph | None = None
        self._is_traced_with_loss = False
        self._collector: Collector | None = None
        # A parallel wrapper still moves the inputs; inside a compiled module a hook would be compiled.
        watched = next(level for level in nesting if not isinstance(level, parallel))
        self._first_forward_hook = watched.register_forward_pre_hook(
            # A copy of the model has its hooks too, but must not be traced.
            lambda module, *call: self._first_forward(*call) if module is watched else None,
            with_kwargs=True,
        )

    def close(self) -> None:
        """Removes all hooks from the model and the optimizers."""
        self._first_forward_hook.remove()
        if self._collector is not None:
            self._collector.close()

    def rebuild_model(
        self, batch: Any, to_loss_fn: ToLoss, optimizer: Any, prune_num: int, **removed: Any
    ) -> PruneResult:
        """Removes the units with the lowest scores since the last call.

        Scores come from the training steps since the last call. If there were none, they come from one
        backward pass on ``batch``. Optimizer state, gradients of other weights, running statistics and
        random states do not change, and without ``compensate`` neither do the kept weights.

        Args:
            batch: the batch on which this call runs the model.
            to_loss_fn: ``to_loss_fn(model, batch)`` gives a loss, or anything that depends on the
                outputs.
            optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these.
            prune_num: number of units to remove.
            removed: options of earlier versions, which raise an error that names their replacement.

        Returns:
            A record of what was removed and what remains.

        Raises:
            PruneError: no unit can be removed, or the cut is not exact. Nothing has changed then.
        """
        for name in removed:
            arguments = ('batch', 'to_loss_fn', 'optimizer', 'prune_num')
            raise PruneError(f'rebuild_model: unknown option {name!r}: {did_you_mean(name, arguments)}')
        budget = replace(self.limits, prune_num=prune_num)
        forward = consumed(lambda model: to_loss_fn(model, batch))
        graph = self._graph
        if graph is None or not self._is_traced_with_loss:
            with self._context.together('the trace'):
                graph = trace(self.model, forward, also=self.also)
            self._report_unseen(graph)
        scores, collector = self._scores(graph, forward)
        result = cut_once(
            replace(self._context, optimizer=optimizer),
            graph,
            scores,
            budget,
            forward,
            check=runs_to_check(graph, forward, self.also) if self.check else None,
            compensate=forward if self.compensate else None,
        )
        if result.stale:
            warnings.warn(result.stale, stacklevel=2)
        if result.plan is None and not self.limits.targets.keys() - {'prune_num'}:
            raise PruneError(f'prune_num={prune_num}: no prunable unit left')
        self._start(result.graph)
        self._is_traced_with_loss = True
        return self._result(result.plan, graph, collector)

    def _result(self, plan: Plan | None, graph: ChannelGraph, collector: Collector) -> PruneResult:
        """Describes a cut; ``plan`` is ``None`` if nothing was removed."""
        fractions = remaining(self.model)
        record, channels = None, {}
        if plan is not None:
            record = plan.cuts[-1]
            outputs = {(axis.name, axis.dim) for axis in cost.output_axes(graph)}
            for name, dims in plan.keep.items():
                for dim, kept in dims.items():
                    if (name, dim) in outputs:
                        channels[name] = (plan.fingerprint[name][dim], len(kept))
        return PruneResult(
            units=(record.units_removed or 0) if record is not None else 0,
            channels=channels,
            flops=record.flops if record is not None else graph.flops,
            params=record.params if record is not None else graph.params,
            keep_flops=fractions['flops'],
            keep_params=fractions['params'],
            iterations=collector.iterations,
            unscored=collector.unscored(),
            plan=plan,
        )

    def _report_unseen(self, graph: ChannelGraph) -> None:
        """Warns of modules that the runs do not use in any process; with ``strict`` it is an error."""
        unused = untouched_parameters(graph.slots, graph.profile)
        if self._context.distributed:
            unused = sorted(set().union(*all_gather(unused)))
        complaint = unseen_by(graph, self.limits, unused)
        if complaint and self._context.strict:
            raise PruneError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=3)

    # -- scores -----------------------------------------------------------------------------------

    def _first_forward(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Traces the model on the inputs of its first forward pass in training mode."""
        if self._collector is None and self.model.training and torch.is_grad_enabled():
            run = lambda model: model(*args, **kwargs)  # noqa: E731
            self._start(trace(self.model, run, also=self.also))

    def _start(self, graph: ChannelGraph) -> None:
        """Makes a collector score the units of ``graph`` in the training steps that follow."""
        self.close()
        distributed = self._context.distributed
        self._collector = Collector(graph, self.score, model=self.model, distributed=distributed)
        self._graph = graph

    def _scores(self, graph: ChannelGraph, forward: Forward) -> tuple[np.ndarray, Collector]:
        """Returns the scores (n_units,) of the units of ``graph``, and the collector that computed
        them."""
        collector = self._collector
        needs_steps = self.score.criterion.needs != 'weights'
        if collector is not None and self._graph is not None:
            # If no training step came after the last cut, one backward pass gives the scores (below).
            if collector.iterations or not needs_steps:
                return transferred(collector.scores(), self._graph, graph), collector
            collector.close()
        distributed = self._context.distributed
        collector = score_batches(self.model, graph, self.score, [forward], distributed)
        return collector.scores(), collector


def _limits(budget: Budget | Mapping[str, Any] | None, options: dict[str, Any]) -> Budget:
    """Makes the budget that all calls start from. Its ``prune_num=1`` is a placeholder, which each call
    replaces by its own number."""
    prune_num = options.get('prune_num')
    if isinstance(budget, Mapping):
        prune_num = budget.get('prune_num')
        budget = {**budget, 'prune_num': 1}
    elif budget is not None:
        prune_num = getattr(budget, 'prune_num', None)
    else:
        options = {**options, 'prune_num': 1}
    if prune_num is not None:
        raise PruneError(f'Pruner: prune_num={prune_num!r} is an argument of rebuild_model')
    return replace(make_budget(budget, own_options(Pruner), **options), prune_num=1)


def score_batches(
    model: nn.Module,
    graph: ChannelGraph,
    score: Score,
    forwards: Iterable[Forward],
    distributed: bool = False,
) -> Collector:
    """Scores units by one backward pass of each of ``forwards``. Gradients, running statistics and
    random states do not change.

    Returns:
        The collector that has seen the passes; it is closed.

    Raises:
        PruneError: a forward returns nothing that depends on trained weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    collector = Collector(graph, score, 'none', model, distributed)
    gradients = [parameter.grad for parameter in parameters]
    try:
        for forward in forwards:
            for parameter in parameters:
                parameter.grad = None
            with unchanged(model), torch.enable_grad():
                outputs = [tensor for tensor in tensors_in(forward(model)) if tensor.requires_grad]
                if not outputs:
                    raise PruneError(
                        'to_loss_fn returns nothing that depends on trained weights: return the loss, '
                        'or the outputs that it is made of'
                    )
                torch.stack([tensor.float().sum() for tensor in outputs]).sum().backward()
            collector.look()
    finally:
        collector.close()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return collector


def transferred(scores: np.ndarray, old: ChannelGraph, new: ChannelGraph) -> np.ndarray:
    """Moves scores from one trace of a model to another trace of the same model.

    Args:
        scores: (old.n_units,) the scores of the units of ``old``.
        old: the graph by which the units were scored.
        new: the graph by which the model is cut. Its units may be larger, since its runs tie more.

    Returns:
        (new.n_units,) scores. A unit that does not have the same channels in ``old`` has no score
        (NaN), and therefore stays.
    """
    if np.array_equal(old.unit_of, new.unit_of):
        return scores
    slots = np.flatnonzero((new.unit_of >= 0) & (old.unit_of >= 0))
    pairs, counts = np.unique(
        np.stack([new.unit_of[slots], old.unit_of[slots]], axis=1), axis=0, return_counts=True
    )
    size_new = np.bincount(new.unit_of[new.unit_of >= 0], minlength=new.n_units)
    size_old = np.bincount(old.unit_of[old.unit_of >= 0], minlength=old.n_units)
    is_same = (counts == size_new[pairs[:, 0]]) & (counts == size_old[pairs[:, 1]])
    moved = np.full(new.n_units, np.nan)
    moved[pairs[is_same, 0]] = scores[pairs[is_same, 1]]
    return moved


# -- structure in a checkpoint ------------------------------------------------------------------------


def save_model_def(model: nn.Module) -> dict[str, Any]:
    """Returns the structure of a model, to be put into a checkpoint dict.

    Args:
        model: a pruned or unpruned model, or a wrapper around it (``torch.compile``, ``DataParallel``).

    Returns:
        Plain numbers, strings, lists and dicts, in format 1 (``Plan.to_meta``).

    Raises:
        PruneError: the model has other shapes than its plan says.

    Example:
        >>> from torch import nn
        >>> structure = mmprune.save_model_def(nn.Conv2d(3, 8, 1))
        >>> structure['format'], structure['fingerprint']['bias']
        (1, [8])
    """
    model = innermost(model)
    shapes = fingerprint(model)
    plan = plan_of(model) or Plan({}, {}, shapes, aliases=aliases_of(model))
    planned = plan.shapes_left()
    for name, shape in shapes.items():
        if planned.get(name, shape) != shape:
            raise PruneError(
                f'{name} has shape {shape_text(shape)}, and the plan of this model leaves '
                f'{shape_text(planned[name])}: something else than mmprune changed it after a cut, so '
                'a checkpoint with this plan could not be loaded'
            )
    return plan.to_meta()


def load_model_def(model: nn.Module, path_or_checkpoint: str | Path | dict[str, Any]) -> nn.Module:
    """Gives a fresh model the structure in a checkpoint, so that a strict ``load_state_dict`` can
    follow.

    Args:
        model: the unpruned model, which is changed in place.
        path_or_checkpoint: a checkpoint file, its content, or the result of :func:`save_model_def`. In
            a dict the structure may have any key, or the place that it has in mmengine's checkpoints.

    Returns:
        ``model``.

    Raises:
        PruneError: the checkpoint has no structure or several, is truncated or corrupt, or is of
            another model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> make = lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, x = make(), torch.zeros(1, 3)
        >>> plan = mmprune.prune(model, lambda m: m(x), prune_num=4, divisor=4)
        >>> checkpoint = {'structure': mmprune.save_model_def(model), 'weights': model.state_dict()}
        >>> fresh = mmprune.load_model_def(make(), checkpoint)
        >>> fresh.load_state_dict(checkpoint['weights'])
        <All keys matched successfully>
    """
    if isinstance(path_or_checkpoint, str | Path):
        source, content = str(path_or_checkpoint), read_file(path_or_checkpoint)
    else:
        source, content = 'the checkpoint', path_or_checkpoint
    if not isinstance(content, dict):
        raise PruneError(f'{source} is a {type(content).__name__}: give a path or a checkpoint dict')
    if plan_of(model) is not None:
        raise PruneError('the model is pruned already: build it again, as it was before pruning')
    plan = Plan.from_meta(content) if _is_structure(content) else plan_in(content)
    if plan is None:
        structures = [value for value in content.values() if _is_structure(value)]
        if len(structures) != 1:
            raise PruneError(
                f'{source} holds {len(structures)} structures, wanted one: save it with '
                "{'structure': mmprune.save_model_def(model), ...}"
            )
        plan = Plan.from_meta(structures[0])
    plan.apply(model)
    return model


def _is_structure(value: Any) -> bool:
    """Whether ``value`` looks like a result of :func:`save_model_def`."""
    return isinstance(value, dict) and {'format', 'fingerprint', 'keep'} <= set(value)
