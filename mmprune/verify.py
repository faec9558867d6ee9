"""Checks a cut: the pruned model computes what the original does with the cut channels at zero."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmprune.errors import PruneError
from mmprune.plan import Plan, check_fingerprint
from mmprune.trace import tensors_in, unchanged

TOLERANCE = 1e-4
"""Largest relative error that rounding explains in single precision, over a deep network."""


def masked(original: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``original`` in which the parameters of every removed channel are zero."""
    check_fingerprint(plan.fingerprint, original, 'the plan')
    model = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim in plan.keep.get(name, {}):
                gone = torch.tensor(plan.removed(name, dim), device=parameter.device)
                parameter.index_fill_(dim, gone, 0)
    return model


def verify(
    original: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    forward: Callable[[nn.Module], Any],
    tolerance: float = TOLERANCE,
) -> float:
    """The largest relative error between ``pruned`` and ``original`` with the cut channels masked.

    Both run ``forward`` with dropout and batch norm in evaluation mode and the same random state. Compared are all tensors of
    the result and the outputs of all modules whose shapes did not change, each by the largest
    absolute difference over the largest absolute value. Decisions (indices, comparisons, numbers of
    proposals) of the first run are repeated in the second, so that rounding can't tip them.

    Raises:
        PruneError: above ``tolerance``, with the first module that differs; or ``forward`` fails.
    """
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
    worst, where = 0.0, ''
    for key, value in wanted.items():
        other = found.get(key)
        if other is None or other.shape != value.shape:
            if key[0] == '':
                shape = None if other is None else tuple(other.shape)
                raise PruneError(
                    f'output {key[1]} of the model has shape {shape}, the original {tuple(value.shape)}'
                )
            continue
        error = relative_error(value, other)
        if not error <= tolerance and worst <= tolerance:
            worst, where = error, key[0]
        worst = max(worst, error)
    if not worst <= tolerance:
        kind = type(pruned.get_submodule(where)).__name__
        raise PruneError(
            f'the pruned model is not the masked original: relative error {worst:.2e} above '
            f'{tolerance:.0e}, first in {where or "the result"} ({kind}): a rule or an adapter errs; '
            'lock the channels that it reads by name'
        )
    return worst


def relative_error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """max |a - b| / max |a|, over finite positions; infinite where only one is finite."""
    if not wanted.numel():
        return 0.0
    a, b = wanted.double(), found.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return float('inf')
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


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
            with decisions:
                out = forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    for position, tensor in enumerate(tensors_in(out)):
        if tensor.is_floating_point():
            found['', position, 0] = tensor.detach()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Modules without children (dropout, batch norm) in evaluation mode; afterwards each module has
    the mode that it had. The others keep theirs: in many heads the code of the loss depends on it."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if next(module.children(), None) is None:
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
    no decisions, and left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[tuple[str, int], list[Any]] = {}
        self._seen: dict[str, int] = {}
        self._replaying = False

    def replay(self) -> None:
        self._replaying, self._seen = True, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, list | tuple) else [out]
        if not any(_decides(r) for r in results) or func._schema.is_mutable:
            return out
        name = str(func)
        number = self._seen[name] = self._seen.get(name, -1) + 1
        if not self._replaying:
            self._taken[name, number] = [
                r.clone() if isinstance(r, torch.Tensor) and _decides(r) else r for r in results
            ]
            return out
        before = self._taken.get((name, number), results)
        repeated = [
            old if _decides(new) and _alike(old, new) else new
            for old, new in zip(before, results, strict=True)
        ]
        if isinstance(out, list | tuple):
            return type(out)(repeated)
        return repeated[0]


def _decides(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() and not value.is_complex()
    return isinstance(value, int)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype
    return isinstance(old, int)
