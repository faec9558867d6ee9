"""Makes networks ready to be timed in eager torch, or in ONNX Runtime or OpenVINO on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmprune.contexts import Forward, evaluating, unchanged
from mmprune.errors import PruneError
from mmprune.onnx_sessions import load_package, open_session, quiet
from mmprune.surgery.meta import first_line

BACKENDS = ('eager', 'onnxruntime', 'openvino')
"""The runtimes in which networks can be timed."""

OPSET = 18
"""The version of the ONNX operators that networks are exported to."""

Prepare = Callable[[nn.Module], Callable[[], Any]]
"""The type of a function that makes a network ready to be timed. It returns a function that runs the
network once at each call."""


def prepare_for(forward: Forward, backend: str) -> Prepare:
    """Returns a function that makes a network ready to be timed in a backend.

    Args:
        forward: runs the model that it is given. For backends other than ``'eager'`` it has to call the
            model itself exactly once. This call is exported, and the tensors among its arguments become
            the inputs.
        backend: ``'eager'``, ``'onnxruntime'`` or ``'openvino'``. The last two run in single precision,
            with as many threads as torch.

    Raises:
        PruneError: the backend is unknown or not installed. The returned function also raises a
            PruneError if a network cannot be exported.
    """
    check_backend(backend)
    if backend == 'eager':
        return lambda model: lambda: forward(model)
    needed(backend)

    def prepare(model: nn.Module) -> Callable[[], Any]:
        with unchanged(model), evaluating(model), torch.no_grad():
            network = _one_call(model, forward)
            try:
                with quiet():
                    program = torch.onnx.export(
                        network.eval(), network.tensors, dynamo=True, opset_version=OPSET, verbose=False
                    )
            except Exception as error:  # the exporter's types of errors are private
                raise PruneError(
                    f'backend={backend!r}: {type(model).__name__} can not be exported to be timed: '
                    f"{type(error).__name__}: {first_line(error)}; take backend='eager'"
                ) from error
        assert program is not None  # with dynamo=True it is a program
        content = program.model_proto
        names = [port.name for port in content.graph.input]
        arrays = [tensor.detach().cpu().numpy() for tensor in network.tensors]
        return loaded(content.SerializeToString(), dict(zip(names, arrays, strict=True)), backend)

    return prepare


class _OneCall(nn.Module):
    """One call of a model, as a function of the tensors among its arguments."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._leaves[i] for i in self._at)

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self._leaves)
        for i, tensor in zip(self._at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return self.model(*args, **kwargs)


def _one_call(model: nn.Module, forward: Forward) -> _OneCall:
    """Runs ``forward`` and returns its only call of ``model``; any other number of calls is an
    error."""
    calls: list[_OneCall] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(_OneCall(model, args, kwargs)), with_kwargs=True
    )
    try:
        forward(model)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise PruneError(
            f'the forward calls the model itself {len(calls)} times, and once is what can be exported '
            "to be timed: give e.g. lambda m: m(x), or take backend='eager'"
        )
    return calls[0]


def convolution(x: torch.Tensor, weight: torch.Tensor, backend: str) -> Callable[[], Any]:
    """Makes a convolution that keeps height and width, and returns a function that runs it.

    Args:
        x: (N, C, H, W) the input.
        weight: (C_out, C, k, k) the kernels, with an odd ``k``.
        backend: one of ``BACKENDS``.
    """
    padding = weight.shape[-1] // 2
    if backend == 'eager':
        return lambda: torch.nn.functional.conv2d(x, weight, padding=padding)
    needed('onnx')
    from onnx import TensorProto, helper, numpy_helper

    image, kernel = (tensor.detach().float().cpu().numpy() for tensor in (x, weight))
    graph = helper.make_graph(
        [helper.make_node('Conv', ['x', 'w'], ['y'], pads=[padding] * 4)],
        'convolution',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, list(image.shape))],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(kernel, 'w')],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=9)
    return loaded(model.SerializeToString(), {'x': image}, backend)


def loaded(content: bytes, feed: dict[str, np.ndarray], backend: str) -> Callable[[], Any]:
    """Loads an ONNX model into a runtime, and returns a function that runs it.

    Args:
        content: the serialized ONNX model.
        feed: {name of an input: the array that it gets at each run}.
        backend: ``'onnxruntime'`` or ``'openvino'``.
    """
    session = open_session(content, backend, torch.get_num_threads())
    return lambda: session.run(feed)


def needed(package: str) -> Any:
    """Imports an optional package.

    Raises:
        PruneError: the package is not installed; the message says how to install it.
    """
    try:
        return load_package(package)
    except PruneError as error:
        raise PruneError(f"{error}; or take backend='eager'") from error


def runtime_versions(backend: str) -> str:
    """Returns the versions of the packages that the times in a backend depend on."""
    versions = f'torch {torch.__version__}'
    if backend != 'eager':
        versions += f', {backend} {needed(backend).__version__}'
    return versions


def check_backend(backend: str) -> None:
    """Raises a PruneError for an unknown backend."""
    if backend not in BACKENDS:
        raise PruneError(f'backend={backend!r}: expected one of {", ".join(BACKENDS)}')
