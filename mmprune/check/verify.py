"""Checks a cut: the pruned model computes what the original does with the removed channels at zero.

The problem: a rule or an adapter may be wrong, so a cut has to be compared with something independent
of them. The idea: in the original, set the parameters of all removed channels to zero, and run both
models on one batch. Everything that still has its shape must be equal up to rounding.

Example: of a convolution with 8 channels, 4 are removed. Its own output has another shape, so it is not
compared. The next convolution reads 8 channels in the original, of which 4 are zero, and 4 in the
pruned model: both must return the same numbers.

Three things make this work on detectors. Both runs proceed in turns, so that few activations are held
(:mod:`mmprune.check.lockstep`). Decisions of the original are repeated in the pruned model, so that a
near tie does not look like a fault (:mod:`mmprune.check.replay`). If the difference could be rounding,
the comparison is repeated in double precision (:mod:`mmprune.check.float64`).
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import _disable_current_modes

from mmprune.check.compare import Comparison, OutputKey, is_finite
from mmprune.check.float64 import doubled, in_double
from mmprune.check.lockstep import RunAhead
from mmprune.check.masked import masked_in_place
from mmprune.check.replay import DecisionReplay, Decisions
from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.copies import copied
from mmprune.errors import InexactCut, PruneError
from mmprune.graph.extensions import intercept
from mmprune.nested import tensors_in, tensors_of_output
from mmprune.surgery.parts import innermost
from mmprune.surgery.plan import Plan
from mmprune.surgery.structure import check_fingerprint

TOLERANCE_IN_DOUBLE = 1e-5
"""Largest relative error in double precision. OpenMMLab's worst conditioned networks reach 1e-6."""


def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Forward,
    tolerance: float | None = None,
) -> float:
    """Compares a pruned model with the original in which the removed channels are masked.

    The comparison covers all tensors of the result, and the outputs of all modules whose shapes did not
    change. Dropout and batch norm are in evaluation mode, and both runs draw the same random numbers.
    Decisions (indices, comparisons, numbers of proposals) of the original are repeated in the pruned
    model, and the tensors that they depend on are compared by their sums. If the error is above the
    tolerance, both models are compared once more in double precision.

    Args:
        original: the model before the cut. Its weights are masked in place during the comparison;
            afterwards they have the same bits as before.
        pruned: the model after the cut.
        plan: the cut from ``original`` to ``pruned``.
        forward: runs the model that it is given, and returns its outputs.
        tolerance: largest relative error that passes. ``None``: ``TOLERANCE``, or 8 machine epsilons of
            the coarsest precision among the results. With a number, double precision is not tried.

    Returns:
        The largest relative error, which is the largest absolute difference over the largest absolute
        value.

    Raises:
        PruneError: the error is above the tolerance, and the message names the first module that
            differs; or ``forward`` fails only for the pruned model.
        PruneError: ``forward`` does not run the model that it is given, or returns nothing that can be
            compared; or a parameter is not finite.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> original = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruned, forward = copy.deepcopy(original), lambda m: m(torch.ones(1, 3))
        >>> plan = mmprune.prune(pruned, forward, prune_num=4, divisor=4)
        >>> mmprune.verify(original, pruned, plan, forward) < 1e-4
        True
    """
    original, pruned = innermost(original), innermost(pruned)
    diverged = [name for name, parameter in original.named_parameters() if not is_finite(parameter)]
    if diverged:
        raise PruneError(
            f'{diverged[0]} and {len(diverged) - 1} more parameters hold NaN or infinity: the training '
            'diverged; go back to an earlier checkpoint'
        )
    error, complaint = compare(original, pruned, plan, forward, tolerance)
    if complaint and tolerance is None and math.isfinite(error):
        with contextlib.suppress(PruneError, RuntimeError):  # not all code runs in double precision
            error, again = compare_in_double(original, pruned, plan, forward)
            complaint = complaint if again else ''
    if complaint:
        raise InexactCut(complaint)
    return error


def compare_in_double(
    original: nn.Module, pruned: nn.Module, plan: Plan, forward: Forward
) -> tuple[float, str]:
    """Calls :func:`compare` with copies of both models in double precision."""
    wide, narrow = copied(original).double(), copied(pruned).double()
    with in_double():
        return compare(wide, narrow, plan, doubled(forward), TOLERANCE_IN_DOUBLE)


def compare(
    original: nn.Module, pruned: nn.Module, plan: Plan, forward: Forward, tolerance: float | None
) -> tuple[float, str]:
    """Makes one comparison for :func:`verify`, with the arguments of that function.

    Returns:
        (largest relative error, complaint). The complaint is empty if the error is small enough.
    """
    check_fingerprint(plan.fingerprint, original, 'the plan', plan.aliases)
    comparison = Comparison(narrower=narrower_layers(pruned, plan))
    with contextlib.ExitStack() as stack:
        for model in (original, pruned):
            stack.enter_context(unchanged(model))
            stack.enter_context(evaluating(model))
        stack.enter_context(masked_in_place(original, plan))
        stack.enter_context(torch.no_grad())
        wanted, found, decided = _run_both(original, pruned, forward, comparison)
    complaint = comparison.add_results(wanted, found)
    if complaint:
        return float('inf'), complaint
    return comparison.verdict(decided, tolerance, dict(pruned.named_modules()))


def _run_both(
    original: nn.Module, pruned: nn.Module, forward: Forward, comparison: Comparison
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """Runs both models in turns, and adds the outputs of their modules to ``comparison``.

    Returns:
        (tensors that the original returned, tensors that the pruned model returned, largest relative
        error of the inputs of decisions)
    """
    decisions = Decisions()
    recording = DecisionReplay(original, decisions)

    def reference(show: Show) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with recording, shown_outputs(original, show, comparison.narrower):
            return tensors_of_output(forward(original))  # inside: iterators may run parts of the model

    ahead = RunAhead(reference)
    outputs = _Outputs(ahead, comparison)
    repeating = DecisionReplay(pruned, decisions, outputs.advance)

    def compiled(name: str, *call: Any) -> Any:
        is_original = threading.current_thread() is ahead.thread
        return (recording if is_original else repeating).compiled(name, *call)

    try:
        with intercept(compiled):
            outputs.advance()
            torch.manual_seed(0)
            with repeating, shown_outputs(pruned, outputs.meet, comparison.narrower):
                try:
                    found = tensors_of_output(forward(pruned))
                except (OriginalFailed, PruneError):
                    raise
                except Exception as error:
                    _check_runs_model(repeating)  # the error of another model would say nothing
                    raise InexactCut(
                        f'the pruned model fails: {type(error).__name__}: {error}. A module keeps '
                        'a width as a number: declare it with mmprune.adapter, or lock its channels '
                        'by name'
                    ) from error
            while outputs.advance():
                pass
    except OriginalFailed as failed:
        raise failed.error from None
    finally:
        ahead.close()
    _check_runs_model(recording)
    _check_runs_model(repeating)
    return ahead.result, found, decisions.error


def _check_runs_model(replay: DecisionReplay) -> None:
    """Raises an error if a run did not use the model that ``forward`` got."""
    if not replay.reads_model:
        raise PruneError(
            'forward does not run the model that it is given, but another one (or none): write it as '
            'lambda model: model(x)'
        )


class OriginalFailed(Exception):
    """Carries an error of the original out of the pruned model's forward, which waits for it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


Show = Callable[[OutputKey, torch.Tensor], None]
"""Called with the key of an output and the tensor."""


class _Outputs:
    """Compares each output of the pruned model with the same output of the run ahead."""

    def __init__(self, ahead: RunAhead, comparison: Comparison) -> None:
        self._ahead, self._comparison = ahead, comparison
        self._waiting: dict[OutputKey, torch.Tensor] = {}  # shown, but not made by the pruned model yet

    def advance(self) -> bool:
        """Lets the run ahead continue. Returns whether it had not ended before."""
        shown = self._ahead.shown
        if shown:  # the run ahead may write over the last tensor, which was not copied
            key, tensor = shown.pop()
            shown.append((key, tensor.clone()))
        if self._ahead.ended:
            return False
        try:
            self._ahead.advance()
        except Exception as error:
            raise OriginalFailed(error) from error
        return True

    def meet(self, key: OutputKey, value: torch.Tensor) -> None:
        """Compares an output of the pruned model, if the original has made the same one."""
        with _disable_current_modes():  # the comparison makes no decisions of the pruned model
            shown = self._ahead.shown
            while key not in self._waiting and shown:
                shown_key, tensor = shown.popleft()
                if shown_key == key:
                    self._comparison.add(key, tensor, value)
                else:
                    self._waiting[shown_key] = tensor.clone()  # the run ahead may write over it
                if not shown:
                    self.advance()  # the pruned model now needs the decisions up to the next output
                if shown_key == key:
                    return
            if key in self._waiting:
                self._comparison.add(key, self._waiting.pop(key), value)


@contextlib.contextmanager
def shown_outputs(model: nn.Module, show: Show, narrower: set[str]) -> Iterator[None]:
    """Calls ``show`` with each floating point output of each module without children.

    Args:
        model: any model.
        show: called with (module name, index of its call, position of the tensor) and the tensor.
        narrower: names of modules to leave out. The set may grow during the run.
    """
    calls: dict[str, int] = {}

    def after(name: str, out: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        if name in narrower:
            return
        for position, tensor in enumerate(tensors_in(out)):
            if tensor.is_floating_point():
                show((name, call, position), tensor.detach())

    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: after(name, out))
        for name, module in model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def narrower_layers(model: nn.Module, plan: Plan) -> set[str]:
    """Returns the names of layers whose outputs lose channels by ``plan``, so that they can't be
    compared."""
    # Dimension 0 of the weight is the output of these layers, but not of a transposed convolution.
    plain = (nn.Linear, _ConvNd, _NormBase)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, plain)
        and not isinstance(module, _ConvTransposeNd)
        and 0 in plan.keep.get(f'{name}.weight', {})
    }
