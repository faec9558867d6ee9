"""Checks a cut: the pruned model computes what the original does with the cut channels at zero."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from mmprune.adapters import intercept
from mmprune.double import in_double
from mmprune.errors import PruneError
from mmprune.plan import Plan, check_fingerprint
from mmprune.runs import tensors_in, unchanged
from mmprune.slots import named_state

TOLERANCE = 1e-4
"""Largest relative error that rounding explains in single precision, over a deep network."""

DOUBLE = 1e-5
"""The same in double precision: the worst conditioned networks of the zoos come to 1e-6."""

MASK = 1e-18
"""What stands for zero: a weight that is divided by its own norm (weight norm) would be NaN at zero.
Its square is still a normal number in single precision; in half precision it is zero."""


def masked(original: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``original`` in which the parameters of every removed channel are zero (``MASK``)."""
    check_fingerprint(plan.fingerprint, original, 'the plan')
    model = copied(original)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim in plan.keep.get(name, {}):
                gone = torch.tensor(plan.removed(name, dim), device=parameter.device)
                parameter.index_fill_(dim, gone, MASK)
    return model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps a result with its graph (as weight norm does)."""
    results = [
        value for module in model.modules() for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]  # fmt: skip
    memo = {id(value): value.detach().clone() for value in results}
    twin = copy.deepcopy(model, memo)
    for module in model.modules():
        forward = vars(module).get('forward')
        if isinstance(forward, FunctionType):
            vars(memo[id(module)])['forward'] = _rebound(forward, memo)
    return twin


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A function that was put in the place of a module's forward (as gradient checkpointing does),
    with the copy where it holds the module: ``deepcopy`` would have the copy run the original."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _rebound(value.__self__, memo))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__)
        memo[id(value)] = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        memo[id(value)].__kwdefaults__ = value.__kwdefaults__
        for cell, old in zip(cells, value.__closure__, strict=True):
            cell.cell_contents = _rebound(old.cell_contents, memo)
    return memo[id(value)]


def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Callable[[nn.Module], Any],
    tolerance: float | None = None,
) -> float:
    """The largest relative error between ``pruned`` and ``original`` with the cut channels masked.

    Both run ``forward`` with dropout and batch norm in evaluation mode and the same random state.
    Compared are all tensors of the result and the outputs of all modules whose shapes did not
    change, each by the largest absolute difference over the largest absolute value. Decisions
    (indices, comparisons, numbers of proposals) of the first run are repeated in the second, so that
    rounding can't tip them; what they were taken on is compared by its sum. ``tolerance``: by
    default ``TOLERANCE``, or 8 units in the last place of the lowest precision among the results.

    Above that, all is run once more in double precision, where rounding can't be the reason: deep
    networks of which a part divides by small numbers lose more than four digits.

    Raises:
        PruneError: above ``tolerance``, with the first module that differs; ``forward`` fails, or
            does not run the model that it is given, or gives nothing that can be compared; a
            parameter is not finite.
    """
    wrong = [name for name, p in original.named_parameters() if not torch.isfinite(p).all()]
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
        raise PruneError(complaint)
    return error


def compare_in_double(
    original: nn.Module, pruned: nn.Module, plan: Plan, forward: Callable[[nn.Module], Any]
) -> tuple[float, str]:
    """:func:`compare` of copies in double precision."""

    def run(model: nn.Module) -> Any:
        with in_double():
            return forward(model)

    return compare(copied(original).double(), copied(pruned).double(), plan, run, DOUBLE)


def compare(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Callable[[nn.Module], Any],
    tolerance: float | None,
) -> tuple[float, str]:
    """The work of :func:`verify`: the error, and a complaint about it where it is too large."""
    reference = masked(original, plan)
    decisions = Decisions()
    wanted = _outputs(reference, forward, decisions)
    decisions.replay()
    try:
        found = _outputs(pruned, forward, decisions)
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(
            f'the pruned model fails: {type(error).__name__}: {error}. A module keeps a width as a '
            'number: declare it with mmprune.adapter, or lock its channels by name'
        ) from error
    if tolerance is None:
        coarsest = max((torch.finfo(value.dtype).eps for value in wanted.values()), default=0.0)
        tolerance = max(TOLERANCE, 8 * coarsest)
    # A head that runs on five levels may give next to nothing on one of them.
    scales: dict[tuple[str, int], float] = {}
    for (name, _, position), value in wanted.items():
        scales[name, position] = max(scales.get((name, position), 0.0), largest(value))
    worst, where, compared = decisions.error, 'a comparison or a choice', 0
    for key, value in wanted.items():
        other = found.get(key)
        if other is None or other.shape != value.shape:
            if key[0] == '':
                shape = None if other is None else tuple(other.shape)
                return float('inf'), (
                    f'output {key[1]} of the model has shape {shape}, the original {tuple(value.shape)}'
                )
            continue
        compared += int(torch.isfinite(value).sum())
        error = relative_error(value, other, scales.get((key[0], key[2]), 0.0) if key[0] else 0.0)
        if not error <= tolerance and worst <= tolerance:
            worst, where = error, key[0]
        worst = max(worst, error)
    if not compared:
        raise PruneError(
            'nothing can be compared: forward returns no finite number, and no module gives one of '
            'an unchanged shape; return the outputs, from a batch that makes them finite'
        )
    if worst <= tolerance:
        return worst, ''
    kind = type(dict(pruned.named_modules()).get(where, pruned)).__name__
    return worst, (
        f'the pruned model is not the masked original: relative error {worst:.2e} above '
        f'{tolerance:.0e}, first in {where or "the result"} ({kind}): a rule or an adapter errs; '
        'lock the channels that it reads by name'
    )


def largest(value: torch.Tensor) -> float:
    """max |value| over finite positions; 0 where there are none."""
    finite = value[torch.isfinite(value)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def relative_error(wanted: torch.Tensor, found: torch.Tensor, scale: float = 0.0) -> float:
    """max |a - b| / max(max |a|, scale), over finite positions; infinite where only one is finite."""
    if not wanted.numel():
        return 0.0
    a, b = wanted.double(), found.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return float('inf')
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(max(scale, 1e-12)))


Key = tuple[str, int, int]


def _outputs(model: nn.Module, forward: Callable, decisions: 'Decisions') -> dict[Key, torch.Tensor]:
    """Float outputs of every module call by (name, call, position), and of the model by ''."""
    found: dict[Key, torch.Tensor] = {}
    calls: dict[str, int] = {}
    hooks = []

    def keep(name: str, out: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        for position, tensor in enumerate(tensors_in(out)):
            if tensor.is_floating_point():
                found[name, call, position] = tensor.detach().clone()

    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, out)))
    try:
        with evaluating(model), unchanged(model), torch.no_grad():
            torch.manual_seed(0)
            decisions.begin(model)
            with decisions, intercept(decisions.compiled):
                out = forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not decisions.reads_model:
        raise PruneError(
            'forward does not run the model that it is given, but another one (or none): write it as '
            'lambda model: model(x)'
        )
    for position, tensor in enumerate(tensors_in(out)):
        if tensor.is_floating_point():
            found['', position, 0] = tensor.detach()
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and its like (modules without children or parameters) and norms in evaluation mode;
    afterwards each module has the mode that it had. The others keep theirs: in many heads the code of
    the loss depends on it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        bare = next(module.children(), None) is None and next(module.parameters(), None) is None
        if bare or isinstance(module, _NormBase):
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Decisions(TorchDispatchMode):
    """Records integer and boolean results of one run, and repeats them in a second.

    Near ties in top-k, thresholds and matching fall either way by rounding; what follows would then
    differ without anything being wrong. Results whose shape changed are those of narrower tensors,
    no decisions, and left alone. ``error``: the largest relative difference between what decisions
    were taken on in the two runs (its sum, over the sum of its absolute values).
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[tuple[str, int], list[Any]] = {}
        self._seen: dict[str, int] = {}
        self._replaying = False
        self._bases: dict[tuple[str, int], list[tuple[torch.Size, float, float]]] = {}
        self.error = 0.0
        self.reads_model = False

    def begin(self, model: nn.Module) -> None:
        self._own = {id(tensor) for _, tensor in named_state(model)}
        self.reads_model = False

    def replay(self) -> None:
        self._replaying, self._seen = True, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        inputs = list(tensors_in((args, kwargs)))
        self.reads_model = self.reads_model or any(id(t) in self._own for t in inputs)
        out = func(*args, **(kwargs or {}))
        # A view must stay one: what is written through it has to reach the tensor behind it.
        shares = func._schema.is_mutable or any(r.alias_info for r in func._schema.returns)
        return out if shares else self._repeated(str(func), inputs, out)

    def compiled(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """The same for a compiled function (nms)."""
        return self._repeated(name, list(tensors_in((args, kwargs))), function(*args, **kwargs))

    def _repeated(self, name: str, inputs: list[torch.Tensor], out: Any) -> Any:
        results = out if isinstance(out, list | tuple) else [out]
        if not any(_decides(r) for r in results):
            return out
        number = self._seen[name] = self._seen.get(name, -1) + 1
        bases = [_base(t) for t in inputs if t.is_floating_point()]
        if not self._replaying:
            self._bases[name, number] = bases
            self._taken[name, number] = [
                r.clone() if isinstance(r, torch.Tensor) and _decides(r) else r for r in results
            ]
            return out
        for old, new in zip(self._bases.get((name, number), bases), bases, strict=False):
            if old[0] == new[0]:
                self.error = max(self.error, abs(old[1] - new[1]) / max(old[2], 1e-12))
        before = self._taken.get((name, number), results)
        repeated = [
            old if _decides(new) and _alike(old, new) else new
            for old, new in zip(before, results, strict=True)
        ]
        if isinstance(out, list | tuple):
            return type(out)(repeated)
        return repeated[0]


def _base(tensor: torch.Tensor) -> tuple[torch.Size, float, float]:
    """Shape, sum, and sum of absolute values of what is finite in ``tensor``."""
    finite = tensor.detach().double().nan_to_num(0, 0, 0)
    return tensor.shape, float(finite.sum()), float(finite.abs().sum())


def _decides(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype
    return isinstance(old, int)
