"""The conditions under which a model is traced, scored or checked: modes, random states, attributes.

Each context leaves the model as it was: whatever a run changes is put back at the end.
"""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmprune.errors import PruneError
from mmprune.nested import tensors_of_output

Forward = Callable[[nn.Module], Any]
"""Runs the model that it is given, e.g. ``lambda model: model(x)``."""


# -- runs ----------------------------------------------------------------------------------------------


def consumed(forward: Forward) -> Forward:
    """Wraps ``forward`` so that it returns the list of the tensors in its result instead of the result.
    Iterators in the result are read to their end."""
    return lambda model: tensors_of_output(forward(model))


def in_other_mode(forward: Forward) -> Forward:
    """Wraps ``forward`` so that it runs in training mode if the model is in evaluation mode, and the
    other way round. Many models run further modules in the other mode, such as auxiliary heads. Dropout
    and norms are in evaluation mode in both cases."""

    def run(model: nn.Module) -> Any:
        with modes_restored(model):
            model.train(not model.training)
            with evaluating(model):
                return forward(model)

    return run


def one_after_another(*forwards: Forward) -> Forward:
    """Joins ``forwards`` into one run, which returns the list of their results. A single run is
    returned as it is."""
    if len(forwards) == 1:
        return forwards[0]
    return lambda model: [forward(model) for forward in forwards]


# -- random states -------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Reads the states of the random number generators of Python, numpy and torch.

    Returns:
        Plain data that loads under ``weights_only=True``. ``'cuda'`` has the states of all GPUs if CUDA
        is in use, and is missing otherwise.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        'torch': torch.get_rng_state(),
        'numpy': [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        'python': [version, list(numbers), gauss],
    }
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what :func:`random_state` returned. A single tensor as ``'cuda'`` is the state of the
    current GPU: checkpoints have that, because they may be resumed on another number of GPUs."""
    torch.set_rng_state(state['torch'].cpu())
    name, keys, *others = state['numpy']
    if isinstance(keys, torch.Tensor):  # in checkpoints of earlier versions
        keys = keys.tolist()
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *others))
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    gpus = state.get('cuda')
    if isinstance(gpus, torch.Tensor):
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(gpus.cpu())
    elif gpus is not None:
        torch.cuda.set_rng_state_all(gpus)


@contextlib.contextmanager
def random_state_restored() -> Iterator[None]:
    """Puts the random states back at the end, so that later code draws what it would have drawn."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


# -- the model -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Puts each module back into the mode (training or evaluation) that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts norms, dropout and similar modules (without children or parameters) into evaluation mode.
    Other modules keep their mode, because the code of many losses depends on it."""
    with modes_restored(model):
        for module in model.modules():
            is_bare = next(module.children(), None) is None and next(module.parameters(), None) is None
            if is_bare or isinstance(module, _NormBase):
                module.training = False
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers (running statistics), modes and random states back at the end.

    Raises:
        PruneError: the run changed a parameter.
    """
    buffers_of = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    versions = [(name, parameter, parameter._version) for name, parameter in model.named_parameters()]
    with random_state_restored(), modes_restored(model):
        try:
            yield
        finally:
            for module, buffers in buffers_of:
                module._buffers.update(buffers)  # some modules replace a buffer by a new tensor
            with torch.no_grad():
                for buffer, value in values:
                    if buffer.shape != value.shape:  # observers of quantization resize theirs in place
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
    changed = [name for name, p, version in versions if p._version != version]
    if changed:
        raise PruneError(
            f'the run changes {changed[0]} and {len(changed) - 1} more parameters: give a forward that '
            'only reads them (no optimizer step)'
        )


CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
"""The exact types of attributes whose items :func:`attributes_unchanged` puts back."""

ATTRIBUTES_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has, such as those for parameters, buffers, children and hooks."""


@contextlib.contextmanager
def attributes_unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the attributes of all modules back, and the items of the dictionaries, lists and sets among
    them, so that the next run does not find a shape or a grid that this run has cached."""
    before = []
    for module in model.modules():
        kept = {key: value for key, value in vars(module).items() if key not in ATTRIBUTES_OF_TORCH}
        filled = [(value, copy.copy(value)) for value in kept.values() if type(value) in CONTAINERS]
        before.append((vars(module), kept, filled))
    try:
        yield
    finally:
        for attributes, kept, filled in before:
            for key in attributes.keys() - kept.keys() - ATTRIBUTES_OF_TORCH:
                del attributes[key]
            attributes.update(kept)
            for container, items in filled:
                container.clear()
                add = container.extend if isinstance(container, list) else container.update
                add(items)


# -- inference mode ------------------------------------------------------------------------------------


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Leaves ``torch.inference_mode`` inside the block, so that tensors which are made there can be
    trained."""
    inside = torch.is_inference_mode_enabled()
    with torch.inference_mode(False) if inside else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves ``torch.inference_mode`` inside the block, and gives it no effect where the code of the
    model enters it.

    In inference mode a dispatch mode sees whole composite operations (``aten::conv2d``), which have no
    rule, and a view does not know its base.
    """
    inference_mode: Any = torch.inference_mode
    enter, leave = inference_mode.__enter__, inference_mode.__exit__
    with normal_tensors():
        inference_mode.__enter__, inference_mode.__exit__ = lambda self: None, lambda self, *error: None
        try:
            yield
        finally:
            inference_mode.__enter__, inference_mode.__exit__ = enter, leave
