"""Traces a module, and translates it to an ONNX program. Errors name the part that caused them."""

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
"""Versions of ONNX's operators that torch's exporter writes and that the translations fit."""


def to_onnx(module: nn.Module, example: Tensor, free: dict[int, int], opset: int) -> Any:
    """Exports a module that takes images.

    Args:
        module: a module in evaluation mode that returns tensors. If it has ``output_names``, the
            graph's outputs get these names.
        example: (N, 3, H, W) images of the size to trace with.
        free: {dimension of the images that stays open: divisor of its sizes}.
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
    # The open dimensions get readable names in place of torch's symbols and formulas.
    for dim in free:
        program.model.graph.inputs[0].shape[dim] = {0: 'batch', 2: 'height', 3: 'width'}[dim]
    return program


def traced(module: nn.Module, example: Tensor, free: dict[int, int]) -> torch.export.ExportedProgram:
    """Traces the module with ``torch.export``. The arguments are those of :func:`to_onnx`."""
    dims: dict[int, Any] = {}
    for axis, divisor in free.items():
        size = torch.export.Dim(f'd{axis}', min=1, max=1 << 16)
        dims[axis] = divisor * size if divisor > 1 else size
    running_names: list[str] = []
    try:
        with quiet(), torch.no_grad(), running_modules(module, running_names), traceable():
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
        where = f'{part_of(module, running_names[-1])}: ' if running_names else ''
        remedy = (
            '; give a fixed --size, which more models can be exported at' if {2, 3} & {*free} else ''
        )
        raise PruneError(
            f'{where}can not be traced for export: {type(error).__name__}: {first_line(error)}{remedy}'
        ) from error


def promote(program: torch.export.ExportedProgram) -> None:
    """Converts integer operands to floats if an operation combines them with floats. torch converts
    them implicitly; ONNX does not."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            if node.meta['val'].is_floating_point():
                node.args = tuple(float(x) if isinstance(x, int) else x for x in node.args)
            continue
        if node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor):
            continue
        dtype = node.meta['val'].dtype
        for operand in node.all_input_nodes:
            value = operand.meta.get('val')
            if dtype.is_floating_point and isinstance(value, Tensor) and not value.is_floating_point():
                with program.graph.inserting_before(node):
                    cast = program.graph.call_function(
                        aten._to_copy.default, (operand,), {'dtype': dtype}
                    )
                cast.meta['val'] = value.to(dtype)
                node.replace_input_with(operand, cast)
    program.graph_module.recompile()


@contextlib.contextmanager
def running_modules(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Keeps the list ``names`` equal to the names of the modules that are running, the innermost last.
    After an exception, the last name is that of the module that raised it."""
    handles = []
    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
            # A forward hook that returns a value replaces the output, so this one returns ``None``.
            handles.append(child.register_forward_hook(lambda *_: names.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(module: nn.Module, name: str) -> str:
    """Returns the name of a submodule in the user's model, with its class."""
    return f'{_in_model(name)} ({type(module.get_submodule(name)).__name__})'


def _in_model(name: str) -> str:
    """Removes the names of the wrappers for export from the name of a submodule."""
    return name.removeprefix('network.').removeprefix('model.')


def untranslated(graph: torch.export.ExportedProgram, error: Exception) -> PruneError:
    """Makes the error for an operator that ONNX lacks. It names the module if the exporter's message
    contains the operator or its node."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text, reason = ' '.join(map(str, causes)), first_line(causes[-1])
    for node in graph.graph.nodes:
        if node.op == 'call_function' and isinstance(node.target, torch._ops.OpOverload):
            operator = str(node.target)
            signs = (f"'{node.name}'", f'target=torch.ops.{operator}', f'{operator}>')
            if any(sign in text for sign in signs):
                stack = node.meta.get('nn_module_stack') or {}
                path, class_name = list(stack.values())[-1] if stack else ('', '')
                class_name = (
                    class_name if isinstance(class_name, str) else class_name.__name__
                ).rpartition('.')[2]
                return PruneError(
                    f'{_in_model(path)} ({class_name}): has the operator {operator}, which can not be '
                    f'translated to ONNX ({reason})'
                )
    return PruneError(f'can not be translated to ONNX: {reason}')
