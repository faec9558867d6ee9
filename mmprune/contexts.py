"""What surrounds a run that is traced, scored or checked."""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmprune.errors import PruneError

Forward = Callable[[nn.Module], Any]
"""Runs the model that it is given, e.g. ``lambda model: model(x)``."""

PLAIN = frozenset({
    int, float, bool, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device,
    torch.layout, torch.memory_format, np.ndarray, range, slice,
})  # fmt: skip
"""Types that hold no tensors; most arguments of operations are of one of them."""


def tensors_in(value: Any, depth: int = 6) -> list[torch.Tensor]:
    """Every tensor in nested containers and plain objects (mmengine's data elements included)."""
    found: list[torch.Tensor] = []
    _collect(value, depth, found)
    return found


def _collect(value: Any, depth: int, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif depth == 0 or type(value) in PLAIN or isinstance(value, type | np.ndarray | np.generic):
        return
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, depth - 1, found)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _collect(item, depth - 1, found)
    elif hasattr(value, '__dict__') and not isinstance(value, nn.Module) and not callable(value):
        _collect(vars(value), depth - 1, found)


def random_states(model: nn.Module) -> Callable[[], None]:
    """Notes the states of all random number generators; the function that it returns puts them back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = next(model.parameters(), torch.empty(0))
    on_device = torch.cuda.get_rng_state(first.device) if first.is_cuda else None

    def put_back() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, first.device)

    return put_back


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (running statistics) and random states back as they were."""
    devices = list({t.device for t in model.parameters() if t.device.type == 'cuda'})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    versions = [(name, p, p._version) for name, p in model.named_parameters()]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for module, training, own in modules:
                module.training = training
                module._buffers.update(own)  # some put a new tensor in the place of the old
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
    changed = [name for name, p, version in versions if p._version != version]
    if changed:
        raise PruneError(
            f'the run changes {changed[0]} and {len(changed) - 1} more parameters: give a forward that '
            'only reads them (no optimizer step)'
        )


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


TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module, which hold parameters, buffers, children and hooks."""


@contextlib.contextmanager
def attributes_unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of all modules back as they were, and the items of their dictionaries, lists
    and sets. So a run leaves nothing behind that the next one could find: a shape, a cached grid."""
    before = []
    for module in model.modules():
        own = {key: value for key, value in vars(module).items() if key not in TORCHS_OWN}
        filled = [(value, copy.copy(value)) for value in own.values() if type(value) in CONTAINERS]
        before.append((vars(module), own, filled))
    try:
        yield
    finally:
        for attributes, own, filled in before:
            for key in [key for key in attributes if key not in own and key not in TORCHS_OWN]:
                del attributes[key]
            attributes.update(own)
            for container, items in filled:
                container.clear()
                add = container.extend if isinstance(container, list) else container.update
                add(items)


CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
