"""Where a network is run so that it can be timed: eager torch, ONNX Runtime or OpenVINO, on the CPU."""

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

OPSET = 18

Prepare = Callable[[nn.Module], Callable[[], Any]]
"""Makes a network ready: what it returns runs it once whenever it is called."""


def prepare_for(forward: Forward, backend: str) -> Prepare:
    """How a network of the kind that ``forward`` runs is made ready in a backend.

    Args:
        forward: runs the model that it is given. For other backends than eager it has to call the model
            itself, once: that call is exported, with its tensors as the inputs.
        backend: ``'eager'``; ``'onnxruntime'`` or ``'openvino'``, in single precision, with as many
            threads as torch has.

    Raises:
        PruneError: an unknown backend, or one that is not installed. The function that is returned
            raises one too, for a model that can not be exported.
    """
    check_backend(backend)
    if backend == 'eager':
        return lambda model: lambda: forward(model)
    needed(backend)

    def prepare(model: nn.Module) -> Callable[[], Any]:
        with unchanged(model), evaluating(model), torch.no_grad():
            network, tensors = _called(model, forward)
            try:
                with quiet():
                    program = torch.onnx.export(
                        network.eval(), tensors, dynamo=True, opset_version=OPSET, verbose=False
                    )
            except Exception as error:  # the exporter's own kinds are private
                raise PruneError(
                    f'backend={backend!r}: {type(model).__name__} can not be exported to be timed: '
                    f"{type(error).__name__}: {first_line(error)}; take backend='eager'"
                ) from error
        assert program is not None  # with dynamo=True it is a program
        content = program.model_proto
        names = [port.name for port in content.graph.input]
        feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        return loaded(content.SerializeToString(), feed, backend)

    return prepare


class _Called(nn.Module):
    """One call of a model, as a function of the tensors among its arguments."""

    def __init__(self, model: nn.Module, arguments: tuple[tuple, dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = tree_flatten(arguments)
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


def _called(model: nn.Module, forward: Forward) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The call of ``model`` that ``forward`` makes, and its tensors."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        forward(model)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise PruneError(
            f'the forward calls the model itself {len(calls)} times, and once is what can be exported '
            "to be timed: give e.g. lambda m: m(x), or take backend='eager'"
        )
    network = _Called(model, calls[0])
    return network, network.tensors


def onnx_model(name: str, values: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """(a model of one convolution or matrix product, its inputs). Weights are constants of it."""
    needed('onnx')
    from onnx import TensorProto, helper, numpy_helper

    array = lambda tensor: tensor.detach().float().cpu().numpy()  # noqa: E731
    feed: dict[str, np.ndarray] = {}
    constants: dict[str, np.ndarray] = {}
    options: dict[str, Any] = {}
    if name == 'aten::convolution':
        feed['x'], constants['w'] = array(values['input']), array(values['weight'])
        if values['bias'] is not None:
            constants['b'] = array(values['bias'])
        options = dict(
            strides=values['stride'],
            dilations=values['dilation'],
            pads=[*values['padding']] * 2,
            group=values['groups'],
        )
        kind = 'Conv'
        if values['transposed']:
            kind, options['output_padding'] = 'ConvTranspose', values['output_padding']
    elif name == 'aten::addmm':
        feed['x'], constants['w'] = array(values['mat1']), array(values['mat2'])
        constants['b'], kind = array(values['self']), 'Gemm'
    elif name in ('aten::mm', 'aten::bmm'):
        feed['x'], kind = array(values['self']), 'MatMul'
        (constants if name == 'aten::mm' else feed)['w'] = array(values['mat2'])
    else:
        raise PruneError(
            f'{name} can not be timed in another runtime: there are convolutions, addmm, mm and bmm; '
            "take backend='eager'"
        )
    names = [*dict.fromkeys([*feed, *constants])]
    graph = helper.make_graph(
        [helper.make_node(kind, sorted(names, key='xwb'.index), ['y'], **options)],
        'one',
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(v.shape)) for n, v in feed.items()],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, n) for n, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
    made.ir_version = 9
    return made, feed


def loaded(content: bytes, feed: dict[str, np.ndarray], backend: str) -> Callable[[], Any]:
    """An ONNX model, ready to run on ``feed`` (arrays by name of the input)."""
    session = open_session(content, backend, torch.get_num_threads())
    return lambda: session.run(feed)


def needed(package: str) -> Any:
    """Imports a package that mmprune's core does not require.

    Raises:
        PruneError: it is not installed.
    """
    try:
        return load_package(package)
    except PruneError as error:
        raise PruneError(f"{error}; or take backend='eager'") from error


def versions(backend: str) -> str:
    """What the times of a backend hang on, beside the machine."""
    found = f'torch {torch.__version__}'
    if backend != 'eager':
        found += f', {backend} {needed(backend).__version__}'
    return found


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise PruneError(f'backend={backend!r}: expected one of {", ".join(BACKENDS)}')
