"""Pruning in any training loop, in a few lines."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmprune.api import runs_in, runs_to_check, trace, unseen_by
from mmprune.budget.budget import Budget, make_budget, own_options
from mmprune.contexts import Forward, consumed, tensors_in, unchanged
from mmprune.distributed import all_gather, check_rebuildable, is_distributed, raise_together
from mmprune.errors import PruneError
from mmprune.graph import cost
from mmprune.graph.coupling import ChannelGraph
from mmprune.graph.slots import aliases_of
from mmprune.graph.unseen import untouched_parameters
from mmprune.recalibration import batches_asked, norms_in_training, recalibrate_norms
from mmprune.score import IN_TRAINING, Score, make_score
from mmprune.score.collector import Collector
from mmprune.session import choose_for, cut_once
from mmprune.surgery.build import remaining
from mmprune.surgery.meta import plan_in, read_file
from mmprune.surgery.parts import innermost, unwrapped_in_steps
from mmprune.surgery.plan import Plan, plan_of
from mmprune.surgery.structure import fingerprint, shape_text

ToLoss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class PruneResult:
    """What one call of :meth:`Pruner.rebuild_model` did.

    Args:
        units: how many went.
        channels: {weight: (output channels before, after)} of the layers that are narrower now.
        flops: multiply-adds that are left, of one forward.
        params: parameters that are left.
        keep_flops, keep_params: the same as fractions of the unpruned model's.
        iterations: training steps that the choice rests on (where there were none, 1: the batch of
            the call; 0 where weights alone are asked).
        unscored: {why units could not be scored: how many}.
        plan: the plan of this cut alone, for copies of the model that are to follow it
            (``result.plan.apply(copy)``); ``None`` where nothing went. :func:`mmprune.plan_of` gives
            all cuts of the model as one plan.
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
    """Scores the units of ``model`` in a loop's own training steps, and removes some at each call.

    ::

        pruner = mmprune.Pruner(model)
        for it, batch in enumerate(loader):
            if (it + 1) % prune_freq == 0:
                print(pruner.rebuild_model(batch, to_loss_fn, optimizer, prune_num))
                continue
            ...  # forward, backward, optimizer.step() as ever

    It traces the model at the first forward pass in training mode and scores from the next step of
    any optimizer that holds its weights; with the loss of the first call it is traced once more.

    Args:
        model: cut in place, at each call. Of a wrapper (``torch.compile``, ``DataParallel``) the
            module inside is cut, and :meth:`rebuild_model` passes that to ``to_loss_fn``.
        distributed: the loop runs in several processes, with ``model`` in DistributedDataParallel or
            gradients averaged by the loop itself. All of them call :meth:`rebuild_model` at the same
            step and cut the same units, or none of them any.
        also: further runs of the model (``lambda model: model(x, task='depth')``), for modules that the
            loss does not use. Channels that they read are seen then, and cuts are checked on them too.
        ema_models: averaged copies of the model (``torch.optim.swa_utils.AveragedModel``, or plain
            modules), which are cut alike.
        budget: a :class:`Budget` or a dict of its options, in place of ``options``.
        score: a criterion's name, a :class:`Score`, or a dict of its options.
        check: compare each cut with the masked model before it is kept.
        strict: a cut that fails the check is an error, and so are modules that no run uses; by default
            the groups of channels that are to blame are locked, with a warning, and the rest is cut;
            and modules that no run uses are a warning.
        compensate: weights that stay make up for those that go, by least squares over the batch of
            each call (:mod:`mmprune.compensation`).
        options: those of :class:`Budget`, ``prune_num`` aside: limits such as ``min_channels``,
            ``divisor``, ``lock``, and targets such as ``keep_flops``, at which nothing more is removed.

    Raises:
        PruneError: bad options; ``budget`` beside options; a wrapper that can't follow a cut.

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
        score: str | Mapping[str, Any] | Score = IN_TRAINING,
        check: bool = True,
        strict: bool = False,
        compensate: bool = False,
        **options: Any,
    ) -> None:
        steps = unwrapped_in_steps(model)
        parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        if any(isinstance(step, parallel[0]) for step in steps) and not distributed:
            raise PruneError(
                'the model is in DistributedDataParallel and distributed=False: say '
                'Pruner(model, distributed=True), in every process'
            )
        check_rebuildable(model)
        limits = _limits(budget, options)
        self.wrapper, self.model = model, steps[-1]
        averages = [ema_models] if isinstance(ema_models, nn.Module) else list(ema_models)
        self.also, self.ema_models = runs_in(also), list(map(innermost, averages))
        self.distributed = distributed and is_distributed()
        self.score, self.limits = make_score(score), limits
        self.check, self.strict, self.compensate = check, strict, compensate
        self._of_loss = False  # whether what is scored was traced with the loss
        self._collector: Collector | None = None
        # A parallel wrapper still moves the inputs; inside a compiled module a hook would be compiled.
        watched = next(step for step in steps if not isinstance(step, parallel))
        self._waiting = watched.register_forward_pre_hook(
            lambda module, args, kwargs: self._first_forward(module is watched, args, kwargs),
            with_kwargs=True,
        )

    def close(self) -> None:
        """Takes all hooks away."""
        self._waiting.remove()
        if self._collector is not None:
            self._collector.close()

    def rebuild_model(
        self,
        batch: Any,
        to_loss_fn: ToLoss,
        optimizer: Any,
        prune_num: int,
        recalibrate: bool | Iterable[Any] = False,
    ) -> PruneResult:
        """Removes some units, those with the lowest scores since the last call.

        Scores come from the training steps before; where there were none, from one backward pass on
        ``batch``. Weights that stay (without ``compensate``), optimizer state, gradients of other
        weights, running statistics and random states are as before.

        Args:
            batch: what the model is run on here.
            to_loss_fn: ``to_loss_fn(model, batch)`` gives a loss, or anything that depends on the
                outputs.
            optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of these.
            prune_num: how many units go.
            recalibrate: take the running statistics of batch norms again after the cut, over ``batch``
                (``True``) or over batches that are given; norms in evaluation mode are frozen and stay.

        Returns:
            What was done, and what is left.

        Raises:
            PruneError: no prunable unit left, or the cut is not exact. Nothing has changed then. Or
                the recalibration failed: the statistics are those of before, and the cut is done.
        """
        budget = replace(self.limits, prune_num=prune_num)
        batches = batches_asked(recalibrate, batch)
        norms = norms_in_training(self.model) if batches is not None else []
        forward = consumed(lambda model: to_loss_fn(model, batch))
        together = raise_together if self.distributed else lambda what: contextlib.nullcontext()
        graph = self._collector.trace if self._collector is not None else None
        if graph is None or not self._of_loss:
            with together('the trace'):
                graph = trace(self.model, forward, also=self.also)
            self._tell_unseen(graph)
        scores, collector = self._scores(graph, forward)
        outcome = cut_once(
            self.model,
            graph,
            scores,
            lambda graph, scores: choose_for(
                self.model, forward, graph, scores, budget, self.score.per
            ),
            budget,
            forward=runs_to_check(graph, forward, self.also) if self.check else None,
            compensate=forward if self.compensate else None,
            optimizer=optimizer,
            ema_models=lambda: self.ema_models,
            wrapper=self.wrapper,
            distributed=self.distributed,
            strict=self.strict,
            warn=lambda text: warnings.warn(text, stacklevel=4),
        )
        step = outcome.plan
        if outcome.stale:
            warnings.warn(outcome.stale, stacklevel=2)
        if step is None and not self.limits.targets.keys() - {'prune_num'}:
            raise PruneError(f'prune_num={prune_num}: no prunable unit left')
        self._start(outcome.trace)
        self._of_loss = True
        if batches is not None and step is not None:
            recalibrate_norms(self.model, norms, to_loss_fn, batches, self.distributed)
        return self._result(step, graph, collector)

    def _result(self, step: Plan | None, graph: ChannelGraph, collector: Collector) -> PruneResult:
        left = remaining(self.model)
        record = step.cuts[-1] if step is not None else None
        making = {(axis.name, axis.dim) for axis in cost.output_axes(graph)}
        return PruneResult(
            units=(record.units_removed or 0) if record is not None else 0,
            channels={
                name: (step.fingerprint[name][dim], len(kept))
                for name, dims in step.keep.items()
                for dim, kept in dims.items()
                if (name, dim) in making
            }
            if step is not None
            else {},
            flops=record.flops if record is not None else graph.flops,
            params=record.params if record is not None else graph.params,
            keep_flops=left['flops'],
            keep_params=left['params'],
            iterations=collector.iterations,
            unscored=collector.unscored(),
            plan=step,
        )

    def _tell_unseen(self, graph: ChannelGraph) -> None:
        """Warns of modules that the runs do not use in any process; with ``strict`` it is an error."""
        unused = untouched_parameters(graph.slots, graph.profile)
        if self.distributed:
            unused = sorted(set().union(*all_gather(unused)))
        complaint = unseen_by(graph, self.limits, unused)
        if complaint and self.strict:
            raise PruneError(complaint)
        if complaint:
            warnings.warn(complaint, stacklevel=3)

    # -- scores -----------------------------------------------------------------------------------

    def _first_forward(self, is_own: bool, args: tuple, kwargs: dict[str, Any]) -> None:
        """``is_own``: the model itself runs, not a copy that has its hooks."""
        waiting = self._collector is None and is_own
        if waiting and self.model.training and torch.is_grad_enabled():
            run = lambda model: model(*args, **kwargs)  # noqa: E731
            self._start(trace(self.model, run, also=self.also))

    def _start(self, graph: ChannelGraph) -> None:
        self._waiting.remove()
        if self._collector is not None:
            self._collector.close()
        self._collector = Collector(graph, self.score, model=self.model, distributed=self.distributed)

    def _scores(
        self, graph: ChannelGraph, forward: Callable[[nn.Module], Any]
    ) -> tuple[np.ndarray, Collector]:
        collector = self._collector
        asked = self.score.criterion.needs != 'weights'
        if collector is None or (asked and not collector.iterations):
            if collector is not None:
                collector.close()
            collector = score_batches(self.model, graph, self.score, [forward], self.distributed)
        return transferred(collector.scores(), collector.trace, graph), collector


def _limits(budget: Budget | Mapping[str, Any] | None, options: dict[str, Any]) -> Budget:
    """What holds in each call: the budget that was given, for one unit until it says how many."""
    mapping = isinstance(budget, Mapping)
    asked = options.get('prune_num')
    if budget is not None:
        asked = budget.get('prune_num') if mapping else getattr(budget, 'prune_num', None)
    if asked is not None:
        raise PruneError(f'Pruner: prune_num={asked!r} is an argument of rebuild_model')
    names = own_options(Pruner)
    if budget is None:
        whole = make_budget(None, names, **{**options, 'prune_num': 1})
    else:
        whole = make_budget({**budget, 'prune_num': 1} if mapping else budget, names, **options)
    return replace(whole, prune_num=1)


def score_batches(
    model: nn.Module,
    graph: ChannelGraph,
    score: Score,
    forwards: Iterable[Callable[[nn.Module], Any]],
    distributed: bool = False,
) -> Collector:
    """A collector that has seen a backward pass of each of ``forwards``, which leave gradients, running
    statistics and random states as they were."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    collector = Collector(graph, score, 'none', model, distributed)
    gradients = [p.grad for p in parameters]
    try:
        for forward in forwards:
            for parameter in parameters:
                parameter.grad = None
            with unchanged(model), torch.enable_grad():
                outputs = [t for t in tensors_in(forward(model)) if t.requires_grad]
                if not outputs:
                    raise PruneError(
                        'to_loss_fn returns nothing that depends on trained weights: return the loss, '
                        'or the outputs that it is made of'
                    )
                torch.stack([t.float().sum() for t in outputs]).sum().backward()
            collector.look()
    finally:
        collector.close()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return collector


def transferred(scores: np.ndarray, old: ChannelGraph, new: ChannelGraph) -> np.ndarray:
    """Scores of one trace's units for another trace of the same model: (new units,). A unit that
    holds other channels there has none (NaN), and stays."""
    if np.array_equal(old.unit_of, new.unit_of):
        return scores
    slots = np.flatnonzero((new.unit_of >= 0) & (old.unit_of >= 0))
    pairs, counts = np.unique(
        np.stack([new.unit_of[slots], old.unit_of[slots]], axis=1), axis=0, return_counts=True
    )
    size_new = np.bincount(new.unit_of[new.unit_of >= 0], minlength=new.n_units)
    size_old = np.bincount(old.unit_of[old.unit_of >= 0], minlength=old.n_units)
    same = (counts == size_new[pairs[:, 0]]) & (counts == size_old[pairs[:, 1]])
    found = np.full(new.n_units, np.nan)
    found[pairs[same, 0]] = scores[pairs[same, 1]]
    return found


# -- structure in a checkpoint ------------------------------------------------------------------------


def save_model_def(model: nn.Module) -> dict[str, Any]:
    """The structure of a model, to put into a checkpoint dict.

    Args:
        model: pruned or not, or a wrapper around it (``torch.compile``, ``DataParallel``).

    Returns:
        Plain numbers, strings, lists and dicts, in format 1 (``Plan.to_meta``).

    Raises:
        PruneError: the model has other shapes than its plan leaves.

    Example:
        >>> from torch import nn
        >>> structure = mmprune.save_model_def(nn.Conv2d(3, 8, 1))
        >>> structure['format'], structure['fingerprint']['bias']
        (1, [8])
    """
    model = innermost(model)
    shapes = fingerprint(model)
    plan = plan_of(model) or Plan({}, {}, shapes, aliases=aliases_of(model))
    left = plan.shapes_left()
    for name, shape in shapes.items():
        if left.get(name, shape) != shape:
            raise PruneError(
                f'{name} has shape {shape_text(shape)}, and the plan of this model leaves '
                f'{shape_text(left[name])}: something else than mmprune changed it after a cut, so a '
                'checkpoint with this plan could not be loaded'
            )
    return plan.to_meta()


def load_model_def(model: nn.Module, path_or_checkpoint: str | Path | dict[str, Any]) -> nn.Module:
    """Gives a fresh model the structure in a checkpoint; a strict ``load_state_dict`` can follow.

    Args:
        model: unpruned; changed in place.
        path_or_checkpoint: a file, its content, or what :func:`save_model_def` returned. In a dict it
            may stand under any name, or where mmengine's checkpoints have it.

    Returns:
        ``model``.

    Raises:
        PruneError: no structure in it, more than one, truncated or corrupt, or of another model.

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
        where, content = str(path_or_checkpoint), read_file(path_or_checkpoint)
    else:
        where, content = 'the checkpoint', path_or_checkpoint
    if not isinstance(content, dict):
        raise PruneError(f'{where} is a {type(content).__name__}: give a path or a checkpoint dict')
    if plan_of(model) is not None:
        raise PruneError('the model is pruned already: build it again, as it was before pruning')
    plan = Plan.from_meta(content) if _is_structure(content) else plan_in(content)
    if plan is None:
        found = [key for key, value in content.items() if _is_structure(value)]
        if len(found) != 1:
            raise PruneError(
                f'{where} holds {len(found)} structures, wanted one: save it with '
                "{'structure': mmprune.save_model_def(model), ...}"
            )
        plan = Plan.from_meta(content[found[0]])
    plan.apply(model)
    return model


def _is_structure(value: Any) -> bool:
    return isinstance(value, dict) and {'format', 'fingerprint', 'keep'} <= set(value)
