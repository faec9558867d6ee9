"""From a module to an ONNX program: tracing, translation, and whose fault it is where that fails."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.deploy.compiled import plain_operators
from mmprune.mm.deploy.ops import translations
from mmprune.surgery.meta import first_line

OPSETS = range(18, 24)
"""What the translations hold for, and torch's exporter writes."""


def to_onnx(module: nn.Module, example: Tensor, free: dict[int, int], opset: int) -> Any:
    """The ``onnx_ir`` program of a module that takes images, and gives a tensor or several.

    Args:
        module: in evaluation mode; ``output_names`` of it are those of the graph, if it has any.
        example: (N, 3, H, W) images of the size to trace with.
        free: which dimensions of the images are left open, and what each is a multiple of.
        opset: version of ONNX's operators, one of ``OPSETS``.

    Raises:
        PruneError: the module can't be traced at such sizes, or has an operator that ONNX lacks; the
            part of it is named.
    """
    if opset not in OPSETS:
        raise PruneError(f'opset={opset}: must be {OPSETS[0]} to {OPSETS[-1]}')
    graph = traced(module, example, free)
    names = list(getattr(module, 'output_names', None) or ())
    names += _numbered(graph)[len(names) :]
    try:
        with quiet():
            program = torch.onnx.export(
                graph, (example,), dynamo=True, opset_version=opset, input_names=['input'],
                output_names=names, custom_translation_table=translations(), verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter's own kinds are private
        raise untranslated(graph, error) from error
    name_sizes(program, free)
    return program


def traced(module: nn.Module, example: Tensor, free: dict[int, int]) -> torch.export.ExportedProgram:
    """The module as torch's export sees it."""
    dims: dict[int, Any] = {}
    for number, divisor in free.items():
        dim = torch.export.Dim(f'd{number}', min=1, max=1 << 16)
        dims[number] = divisor * dim if divisor > 1 else dim
    stack: list[str] = []
    try:
        with quiet(), torch.no_grad(), entered_modules(module, stack), inference_path():
            graph = torch.export.export(
                module, (example,), dynamic_shapes=(dims or None,), strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
            promote(graph)
            return graph
    except PruneError:
        raise
    except Exception as error:  # whatever a model's code may raise on tensors without data
        where = f'{stack[-1]}: ' if stack else ''
        if stack:
            name = stack[-1].removeprefix('network.').removeprefix('model.')
            where = f'{name} ({type(module.get_submodule(stack[-1])).__name__}): '
        open_sides = any(number in free for number in (2, 3))
        remedy = '; give a fixed --size, which more models can be exported at' if open_sides else ''
        raise PruneError(
            f'{where}can not be traced for export: {type(error).__name__}: {first_line(error)}{remedy}'
        ) from error


def promote(program: torch.export.ExportedProgram) -> None:
    """Integers that meet fractions become fractions first: torch does so by itself, ONNX does not."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            if node.meta['val'].is_floating_point():
                node.args = tuple(float(x) if isinstance(x, int) else x for x in node.args)
            continue
        if node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor):
            continue
        kind = node.meta['val'].dtype
        for given in node.all_input_nodes:
            value = given.meta.get('val')
            if kind.is_floating_point and isinstance(value, Tensor) and not value.is_floating_point():
                with program.graph.inserting_before(node):
                    cast = program.graph.call_function(aten._to_copy.default, (given,), {'dtype': kind})
                cast.meta['val'] = value.to(kind)
                node.replace_input_with(given, cast)
    program.graph_module.recompile()


@contextlib.contextmanager
def entered_modules(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """While it holds, ``stack`` has the names of the modules that are running; those that were when
    an exception came stay."""
    handles = []
    for name, part in module.named_modules():
        if not name:
            continue
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(part.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def inference_path() -> Iterator[None]:
    """Operators that can be translated: of torch's attention the plain one, no compiled functions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_operators():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own insides."""
    loggers = map(logging.getLogger, ('torch.onnx', 'onnxscript', 'torch.export', 'torch._export'))
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter('ignore')
        for logger in loggers:
            stack.enter_context(mock.patch.object(logger, 'disabled', True))
        yield


def untranslated(graph: torch.export.ExportedProgram, error: Exception) -> PruneError:
    """An operator that ONNX lacks, with the module that it is in, as far as the exporter tells."""
    causes: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in causes:
        causes.append(at)
        at = at.__cause__ or at.__context__
    text = ' '.join(str(cause) for cause in causes)
    for node in graph.graph.nodes:
        if node.op == 'call_function' and isinstance(node.target, torch._ops.OpOverload):
            name = str(node.target)
            if f"'{node.name}'" in text or f'target=torch.ops.{name}' in text or f'{name}>' in text:
                stack = node.meta.get('nn_module_stack') or {}
                path, kind = list(stack.values())[-1] if stack else ('', '')
                kind = kind if isinstance(kind, str) else kind.__name__
                path = path.removeprefix('network.').removeprefix('model.')
                return PruneError(
                    f'{path} ({kind.rsplit(".", 1)[-1]}): has the operator '
                    f'{name}, which can not be translated to ONNX ({first_line(causes[-1])})'
                )
    return PruneError(f'can not be translated to ONNX: {first_line(causes[-1])}')


def _numbered(graph: torch.export.ExportedProgram) -> list[str]:
    return [f'output_{i}' for i in range(len(graph.graph_signature.user_outputs))]


def name_sizes(program: Any, free: dict[int, int]) -> None:
    """Readable names of the open dimensions, in place of torch's symbols and formulas."""
    names = {0: 'batch', 2: 'height', 3: 'width'}
    image = program.model.graph.inputs[0]
    for number in free:
        image.shape[number] = names[number]
