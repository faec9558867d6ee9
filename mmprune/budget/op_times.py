"""Seconds of single operations at the widths that a cut can leave, in the runtime that is deployed."""

import contextlib
import functools
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from mmprune.budget.device import least_of
from mmprune.errors import PruneError
from mmprune.graph.call import bind

BACKENDS = ('eager', 'onnxruntime', 'openvino')
POINTS = 8
"""Widths at most that an operation is timed at in each of its dimensions."""


@dataclass(frozen=True)
class Slot:
    """A tensor among an operation's arguments: its shape, and for each dimension the number of the
    width that it follows (-1: none)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    follows: tuple[int, ...]
    channels_last: bool


@dataclass
class Op:
    """One operation of the run: ``arguments`` with :class:`Slot` in place of tensors; ``widths``: the
    units (-1: locked) at the positions of each width that a cut changes; ``calls``: how often."""

    func: Any
    arguments: tuple
    keywords: dict[str, Any]
    widths: list[np.ndarray]
    calls: int = 1

    @property
    def key(self) -> tuple:
        return (str(self.func), repr(self.arguments), repr(self.keywords))


class Lookup:
    """Seconds by the kept positions of one or two widths, from a table at steps.

    ``points``: for each width the steps; ``values``: seconds, of their shape. A width between two steps
    costs what the next one does, for the widths of ``sizes`` and steps of ``divisor``; between steps
    that were left out of the table it is interpolated.
    """

    def __init__(
        self, points: list[list[int]], values: np.ndarray, sizes: list[int], divisor: int
    ) -> None:
        for dim in range(values.ndim):  # wider is never faster
            values = np.maximum.accumulate(values, axis=dim)
        self.points = [np.array(each, dtype=np.float64) for each in points]
        self.values, self.sizes, self.divisor = values, sizes, divisor

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        corners = [(np.float64(1.0), ())]  # (weight, indices) of the table's entries around it
        for points, size, count in zip(self.points, self.sizes, counts, strict=False):
            up = np.minimum(np.ceil(np.asarray(count) / self.divisor - 1e-9) * self.divisor, size)
            up = np.where(np.asarray(count) <= points[0], points[0], up)
            low = np.clip(np.searchsorted(points, up, side='right') - 1, 0, max(points.size - 2, 0))
            high = np.minimum(low + 1, points.size - 1)
            part = np.clip((up - points[low]) / np.maximum(points[high] - points[low], 1e-9), 0, 1)
            corners = [
                (weight * share, (*index, at))
                for weight, index in corners
                for share, at in ((1 - part, low), (part, high))
            ]
        amounts = sum(weight * self.values[index] for weight, index in corners)
        return cast(np.ndarray, amounts)  # not 0: there is one corner at least


class Scaled:
    """A function's amounts, so many times."""

    def __init__(self, function: Callable, times: float) -> None:
        self.function, self.times = function, times

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        return self.times * self.function(counts)


def steps_of(size: int, divisor: int) -> list[int]:
    """Where a width of ``size`` is looked at: at multiples of the divisor, ``POINTS`` of them at most
    and evenly spread, at halves and quarters of it, and as it is."""
    below = [divisor // part for part in (4, 2) if divisor // part >= 4]
    steps = list(range(divisor, size, divisor))
    if len(steps) >= POINTS:
        steps = [steps[round(i * (len(steps) - 1) / (POINTS - 2))] for i in range(POINTS - 1)]
    return sorted({step for step in (*below, *steps) if step < size} | {size})


def table_of(
    op: Op,
    device: torch.device,
    backend: str,
    divisor: int,
    rounds: int,
    kept: dict[str, Any],
    where: str,
) -> Lookup:
    """The times of one operation; what ``kept`` holds is not measured again, what is goes there.

    ``where``: names the machine and the versions.
    """
    sizes = [width.size for width in op.widths[:2]]  # attention has a third, its heads: they stay
    points = [steps_of(size, divisor) for size in sizes]
    key = hashlib.sha256(repr((where, backend, op.key, points)).encode()).hexdigest()[:32]
    shape = tuple(len(each) for each in points)
    known = kept.get(key)
    if not (isinstance(known, list) and np.shape(known) == shape):
        calls = {}
        for index in np.ndindex(shape):
            counts = [each[i] for each, i in zip(points, index, strict=True)]
            counts += [width.size for width in op.widths[2:]]
            calls[index] = call_of(op, counts, device, backend)
        times = least_of(calls, device, rounds)
        known = np.empty(shape)
        for index, seconds in times.items():
            known[index] = seconds
        known = known.tolist()
        kept[key] = known
    return Lookup(points, np.array(known, dtype=np.float64), sizes, divisor)


# -- running one --------------------------------------------------------------------------------------


def arguments_at(op: Op, counts: list[int], device: torch.device) -> dict[str, Any]:
    """The operation's arguments by name, with so many kept positions of each of its widths."""

    def made(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(made(each) for each in value)
        if not isinstance(value, Slot):
            return value
        shape = [
            size if follows < 0 else max(1, round(size * counts[follows] / op.widths[follows].size))
            for size, follows in zip(value.shape, value.follows, strict=True)
        ]
        tensor = torch.zeros(shape, dtype=value.dtype, device=device)
        if tensor.is_floating_point():
            tensor.normal_()
        return tensor.contiguous(memory_format=torch.channels_last) if value.channels_last else tensor

    arguments = bind(op.func, op.arguments, op.keywords)
    values = {name: made(value) for name, value in arguments.items()}
    groups = values.get('groups', 1)
    if groups > 1 and groups == arguments['input'].shape[1]:
        values['groups'] = values['input'].shape[1]
    elif groups > 1:
        _whole_groups(values, groups)
    return values


def _whole_groups(values: dict[str, Any], groups: int) -> None:
    """Rounding must leave a grouped convolution whole groups on both sides."""
    x, weight, bias = values['input'], values['weight'], values.get('bias')
    rows = max(1, weight.shape[0] // groups) * groups
    sides = (weight.shape[1] * groups, rows)
    channels, outputs = reversed(sides) if values.get('transposed') else sides
    values['weight'] = weight.new_zeros(rows, *weight.shape[1:])
    values['input'] = x.new_zeros(x.shape[0], channels, *x.shape[2:])
    if bias is not None:
        values['bias'] = bias.new_zeros(outputs)


def call_of(op: Op, counts: list[int], device: torch.device, backend: str) -> Callable[[], Any]:
    """Runs the operation once, when called."""
    values = arguments_at(op, counts, device)
    if backend != 'eager':
        return runtime_call(str(op.func._schema.name), values, backend)
    positional = [values[a.name] for a in op.func._schema.arguments if not a.kwarg_only]
    keywords = {a.name: values[a.name] for a in op.func._schema.arguments if a.kwarg_only}
    return functools.partial(op.func, *positional, **keywords)


# -- as little ONNX models ----------------------------------------------------------------------------


def runtime_call(name: str, values: dict[str, Any], backend: str) -> Callable[[], Any]:
    """The same in ONNX Runtime or OpenVINO, with as many threads as torch has here."""
    model, feed = onnx_model(name, values)
    threads = torch.get_num_threads()
    if backend == 'onnxruntime':
        runtime = needed('onnxruntime')
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=['CPUExecutionProvider']
        )
        return lambda: session.run(None, feed)
    openvino = needed('openvino')
    core = openvino.Core()
    settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'}
    read = core.read_model(io.BytesIO(model.SerializeToString()))
    request = core.compile_model(read, 'CPU', settings).create_infer_request()
    return lambda: request.infer(feed)


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


def needed(package: str) -> Any:
    """The package, imported; it is not among what mmprune always needs."""
    try:
        with _quiet():
            return __import__(package)
    except ImportError as error:
        raise PruneError(
            f'{package} can not be imported ({error}): pip install {package}, which times of that '
            "runtime are taken with; or take backend='eager'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def versions(backend: str) -> str:
    """What the times of a backend hang on, beside the machine."""
    found = f'torch {torch.__version__}'
    if backend != 'eager':
        found += f', {backend} {needed(backend).__version__}'
    return found


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise PruneError(f'backend={backend!r}: expected one of {", ".join(BACKENDS)}')
