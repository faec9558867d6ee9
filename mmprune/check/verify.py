"""Checks a cut: the pruned model computes what the original does with the cut channels at zero."""

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

from mmprune.check.compare import (
    Comparison,
    Key,
    is_finite,
)
from mmprune.check.float64 import doubled, in_double
from mmprune.check.lockstep import RunAhead
from mmprune.check.masked import masked_in_place
from mmprune.check.replay import DecisionReplay, Taken
from mmprune.contexts import Forward, evaluating, tensors_in, tensors_of_output, unchanged
from mmprune.copies import copied
from mmprune.errors import InexactCut, PruneError
from mmprune.graph.extensions import intercept
from mmprune.surgery.parts import innermost
from mmprune.surgery.plan import Plan, check_fingerprint

DOUBLE = 1e-5
"""The same in double precision: the worst conditioned networks of the zoos come to 1e-6."""


def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Forward,
    tolerance: float | None = None,
) -> float:
    """Compares a pruned model with the original in which the cut channels are masked.

    Both run ``forward`` side by side, each module right after its like in the other model, so that no
    more than two activations are held for the comparison. Dropout and batch norm are in evaluation
    mode, and the random state is the same. Compared are all tensors of the result and the outputs of
    all modules whose shapes did not change, each by the largest absolute difference over the largest
    absolute value. Decisions (indices, comparisons, numbers of proposals) of the original are repeated
    in the pruned model, so that rounding can't tip them; what they were taken on is compared by sum.

    Above the tolerance, all is run once more in double precision, where rounding can't be the reason:
    deep networks of which a part divides by small numbers lose more than four digits.

    Args:
        original: the model before the cut. Its weights are masked in place meanwhile, and are put
            back to the bit.
        pruned: the same after the cut.
        plan: the cut between the two.
        forward: runs the model that it is given, and returns its outputs.
        tolerance: by default ``TOLERANCE``, or 8 units in the last place of the lowest precision among
            the results. Where it is given, double precision is not tried.

    Returns:
        The largest relative error, the largest absolute difference over the largest absolute value.

    Raises:
        InexactCut: above ``tolerance``, with the first module that differs; or ``forward`` fails for
            the pruned model alone.
        PruneError: ``forward`` does not run the model that it is given, or gives nothing that can be
            compared; a parameter is not finite.

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
    wrong = [name for name, p in original.named_parameters() if not is_finite(p)]
    if wrong:
        raise PruneError(
            f'{wrong[0]} and {len(wrong) - 1} more parameters hold NaN or infinity: the training '
            'diverged; go back to an earlier checkpoint'
        )
    error, complaint = compare(original, pruned, plan, forward, tolerance)
    if complaint and tolerance is None and math.isfinite(error):
        with contextlib.suppress(PruneError, RuntimeError):  # not all code runs in double
            error, again = compare_in_double(original, pruned, plan, forward)
            complaint = complaint if again else ''
    if complaint:
        raise InexactCut(complaint)
    return error


def compare_in_double(
    original: nn.Module, pruned: nn.Module, plan: Plan, forward: Forward
) -> tuple[float, str]:
    """:func:`compare` of copies in double precision."""
    wide, narrow = copied(original).double(), copied(pruned).double()
    with in_double():
        return compare(wide, narrow, plan, doubled(forward), DOUBLE)


def compare(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Forward,
    tolerance: float | None,
) -> tuple[float, str]:
    """The work of :func:`verify`: the error, and a complaint about it where it is too large."""
    check_fingerprint(plan.fingerprint, original, 'the plan', plan.aliases)
    found = Comparison(narrower=narrower_layers(pruned, plan))
    with contextlib.ExitStack() as stack:
        for model in (original, pruned):
            stack.enter_context(unchanged(model))
            stack.enter_context(evaluating(model))
        stack.enter_context(masked_in_place(original, plan))
        stack.enter_context(torch.no_grad())
        wanted, made, decided = _side_by_side(original, pruned, forward, found)
    complaint = found.results(wanted, made)
    if complaint:
        return float('inf'), complaint
    return found.verdict(decided, tolerance, dict(pruned.named_modules()))


def _side_by_side(
    original: nn.Module, pruned: nn.Module, forward: Forward, found: 'Comparison'
) -> tuple[Any, Any, float]:
    """(result of the original, that of the pruned model, largest error of what decisions were taken
    on). Every output of a module is handed to ``found`` on the way."""
    taken = Taken()
    first = DecisionReplay(original, taken)

    def reference(show: Show) -> Any:
        torch.manual_seed(0)
        with first, shown_outputs(original, show, found.narrower):
            return tensors_of_output(forward(original))  # iterators run parts of the model

    ahead = RunAhead(reference)

    def compiled(name: str, *call: Any) -> Any:
        here = threading.current_thread() is ahead.thread
        return (first if here else second).compiled(name, *call)

    outputs = _Outputs(ahead)
    second = DecisionReplay(pruned, taken, outputs.advance)
    try:
        with intercept(compiled):
            outputs.advance()
            torch.manual_seed(0)
            meet: Show = lambda key, value: outputs.meet(key, value, found)  # noqa: E731
            with second, shown_outputs(pruned, meet, found.narrower):
                try:
                    made = tensors_of_output(forward(pruned))
                except (OriginalFailed, PruneError):
                    raise
                except Exception as error:
                    # On another model than its own there would be no sense in what it says.
                    _check_read(second)
                    raise InexactCut(
                        f'the pruned model fails: {type(error).__name__}: {error}. A module keeps '
                        'a width as a number: declare it with mmprune.adapter, or lock its channels '
                        'by name'
                    ) from error
            while not ahead.ended:
                outputs.advance()
    except OriginalFailed as failed:
        raise failed.error from None
    finally:
        ahead.close()
    for decisions in (first, second):
        _check_read(decisions)
    return ahead.result, made, taken.error


def _check_read(decisions: DecisionReplay) -> None:
    if not decisions.reads_model:
        raise PruneError(
            'forward does not run the model that it is given, but another one (or none): write it as '
            'lambda model: model(x)'
        )


class OriginalFailed(Exception):
    """Carries what the original raised through the pruned model's forward, which waits for it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


Show = Callable[[Key, torch.Tensor], None]


class _Outputs:
    """Outputs of the run ahead, met one by one by those of the run that follows."""

    def __init__(self, ahead: RunAhead) -> None:
        self.ahead = ahead
        self._left: dict[Key, torch.Tensor] = {}  # of modules that only one of the two has come to

    def advance(self) -> bool:
        """Lets the run ahead go on; false where it has ended."""
        shown = self.ahead.shown
        if shown:  # what follows may write over the last of them
            key, tensor = shown.pop()
            shown.append((key, tensor.clone()))
        ended = self.ahead.ended
        try:
            self.ahead.advance()
        except Exception as error:
            raise OriginalFailed(error) from error
        return not ended

    def meet(self, key: Key, value: torch.Tensor, found: 'Comparison') -> None:
        """Compares an output of the second run with its like of the first, if there is one."""
        # What the comparison decides is none of the second run's decisions.
        with _disable_current_modes():
            self._meet(key, value, found)

    def _meet(self, key: Key, value: torch.Tensor, found: 'Comparison') -> None:
        shown = self.ahead.shown
        while key not in self._left and shown:
            other, tensor = shown.popleft()
            if other == key:
                found.add(key, tensor, value)
            else:
                self._left[other] = tensor.clone()  # what follows may write over it
            if not shown:
                self.advance()  # its decisions up to the next output are needed from here on
            if other == key:
                return
        if key in self._left:
            found.add(key, self._left.pop(key), value)


@contextlib.contextmanager
def shown_outputs(model: nn.Module, show: Show, narrower: set[str]) -> Iterator[None]:
    """Calls ``show`` with each floating point output of each module without children, but of those
    that are known to be ``narrower`` in one of the two."""
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
    """Names of layers that give fewer channels than before, so that there is nothing to compare."""
    plain = (nn.Linear, _ConvNd, _NormBase)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, plain)
        and not isinstance(module, _ConvTransposeNd)
        and 0 in plan.keep.get(f'{name}.weight', {})
    }
