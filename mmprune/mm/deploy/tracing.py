"""From a module to an ONNX program: tracing, translation, and which part is to blame if that fails."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmprune.errors import PruneError
from mmprune.mm.deploy.ops import translations
from mmprune.mm.deploy.patches import traceable
from mmprune.onnx_sessions import quiet
from mmprune.surgery.meta import first_line

OPSETS = range(18, 24)
"""Versions of ONNX's operators that torch's exporter writes and the translations hold for."""


def to_onnx(module: nn.Module, example: Tensor, free: dict[int, int], opset: int) -> Any:
    """Exports a module that takes images.

    Args:
        module: a module in evaluation mode that returns tensors. If it has ``output_names``, the
            graph's outputs get these names.
        example: (N, 3, H, W) images of the size to trace with.
        free: the dimensions of the images that stay open, each with the number of which its sizes are
            multiples.
        opset: the version of ONNX's operators, one of ``OPSETS``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        PruneError: the module cannot be traced at such sizes, or has an operator that ONNX lacks. The
            message names the part of the module.
    """
    if opset not in OPSETS:
        raise PruneError(f'opset={opset}: must be {OPSETS[0]} to {OPSETS[-1]}')
    graph = traced(module, example, free)
    names = list(getattr(module, 'output_names', None) or ())
    names += [f'output_{i}' for i in range(len(names), len(graph.graph_signature.user_outputs))]
    options = dict(dynamo=True, opset_version=opset, input_names=['input'], output_names=names)
    try:
        with quiet():
            program = torch.onnx.export(
                graph, (example,), custom_translation_table=translations(), verbose=False, **options
            )
    except Exception as error:  # the exporter's exceptions are private classes
        raise untranslated(graph, error) from error
    # Readable names of the open dimensions replace torch's symbols and formulas.
    for number in free:
        program.model.graph.inputs[0].shape[number] = {0: 'batch', 2: 'height', 3: 'width'}[number]
    return program


def traced(module: nn.Module, example: Tensor, free: dict[int, int]) -> torch.export.ExportedProgram:
    """Traces the module with ``torch.export``. The arguments are those of :func:`to_onnx`."""
    dims: dict[int, Any] = {}
    for number, divisor in free.items():
        dim = torch.export.Dim(f'd{number}', min=1, max=1 << 16)
        dims[number] = divisor * dim if divisor > 1 else dim
    running: list[str] = []
    try:
        with quiet(), torch.no_grad(), running_modules(module, running), traceable():
            graph = torch.export.export(
                module,
                (example,),
                dynamic_shapes=(dims or None,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            promote(graph)
            return graph
    except PruneError:
        raise
    except Exception as error:  # a model's code may raise anything on tensors without data
        where = f'{part_of(module, running[-1])}: ' if running else ''
        remedy = (
            '; give a fixed --size, which more models can be exported at' if {2, 3} & {*free} else ''
        )
        raise PruneError(
            f'{where}can not be traced for export: {type(error).__name__}: {first_line(error)}{remedy}'
        ) from error


def promote(program: torch.export.ExportedProgram) -> None:
    """Converts integers that meet fractions to fractions. torch does that by itself; ONNX does not."""
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
def running_modules(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Keeps the names of the modules that are running in ``names``. After an exception, the last one is
    the module that raised it."""
    handles = []
    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
            handles.append(part.register_forward_hook(lambda *_: names.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(module: nn.Module, name: str) -> str:
    """Returns the name of a submodule in the user's model, with its class."""
    return f'{_in_model(name)} ({type(module.get_submodule(name)).__name__})'


def _in_model(name: str) -> str:
    return name.removeprefix('network.').removeprefix('model.')


def untranslated(graph: torch.export.ExportedProgram, error: Exception) -> PruneError:
    """Makes the error for an operator that ONNX lacks. It names the module if the exporter's message
    contains the operator or its node."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text, why = ' '.join(map(str, causes)), first_line(causes[-1])
    for node in graph.graph.nodes:
        if node.op == 'call_function' and isinstance(node.target, torch._ops.OpOverload):
            operator = str(node.target)
            signs = (f"'{node.name}'", f'target=torch.ops.{operator}', f'{operator}>')
            if any(sign in text for sign in signs):
                stack = node.meta.get('nn_module_stack') or {}
                path, kind = list(stack.values())[-1] if stack else ('', '')
                kind = (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
                return PruneError(
                    f'{_in_model(path)} ({kind}): has the operator {operator}, which can not be '
                    f'translated to ONNX ({why})'
                )
    return PruneError(f'can not be translated to ONNX: {why}')
