"""Elementwise operations tie position by position, with broadcasting."""

from collections.abc import Sequence

import torch

from mmprune.rules.table import Call, Labels, rule


def constrains(call: Call, tensor: torch.Tensor, dim: int) -> bool:
    """Whether an unlabelled dimension has a width of its own. One of size 1 is broadcast; an
    expanded one (stride 0) was broadcast; a fresh fill (``zeros``) is the same at every width."""
    return tensor.shape[dim] > 1 and tensor.stride(dim) != 0 and not call.tracer.is_uniform(tensor)


def broadcast(
    call: Call,
    operands: Sequence[torch.Tensor],
    shape: Sequence[int],
    labels: Sequence[Labels] | None = None,
) -> Labels:
    """Ties ``operands`` as elementwise arithmetic does; returns what a result of ``shape`` carries.

    ``labels``: what the operands carry, where that is not what the tracer knows of them.
    """
    labels = labels or [call.labels(t) for t in operands]
    if not any(labels):
        return {}
    result: Labels = {}
    for dim in range(len(shape)):
        found, fixed = [], False
        for tensor, carried in zip(operands, labels, strict=True):
            own = dim - (len(shape) - tensor.ndim)
            if own < 0 or own >= tensor.ndim:
                continue
            if own in carried:
                found.append(carried[own])
            else:
                fixed = fixed or constrains(call, tensor, own)
        if not found:
            continue
        for other in found[1:]:
            call.tie(found[0], other)
        if fixed:
            call.lock(found[0], 'meets a tensor of fixed width')
        result[dim] = found[0]
    return result


def pointwise(call: Call) -> None:
    """The rule of everything that torch tags as pointwise."""
    values = list(call.args.values())
    operands = [v for v in values if isinstance(v, torch.Tensor)]
    for value in values:
        if isinstance(value, list | tuple):
            operands += [v for v in value if isinstance(v, torch.Tensor)]
    outputs = call.out if isinstance(call.out, list | tuple) else [call.out]
    for out in outputs:
        if not isinstance(out, torch.Tensor):
            continue
        write(call, out, broadcast(call, operands, out.shape))
        if all(call.tracer.is_uniform(t) for t in operands):
            call.tracer.set_uniform(out)


def write(call: Call, target: torch.Tensor, labels: Labels) -> None:
    """Gives ``labels`` to an output, which may be an input written in place.

    Through a view the tensor behind it changes, and that does not learn of new labels: lock them.
    """
    if call.tracer.is_known(target) and target._is_view():
        old = call.labels(target)
        for dim, ids in labels.items():
            if dim not in old:
                call.lock(ids, 'written into a part of another tensor')
    call.label(target, labels)


# Elementwise too, though torch does not tag them so.
rule(
    'aten::hardswish', 'aten::hardswish_', 'aten::_prelu_kernel', 'aten::native_dropout',
    'aten::copy_', 'aten::copy', 'aten::_to_copy', 'aten::clone', 'aten::detach', 'aten::detach_',
    'aten::alias', 'aten::lift_fresh', 'aten::contiguous', 'aten::to', 'aten::rrelu_with_noise',
    'aten::rrelu_with_noise_', 'aten::masked_fill', 'aten::masked_fill_', 'aten::where',
    'aten::hardtanh', 'aten::hardtanh_', 'aten::softplus', 'aten::log_sigmoid_forward',
    'aten::_native_batch_norm_dropout', 'aten::fill_',
    'aten::zero_', 'aten::isclose', 'aten::clamp', 'aten::clamp_', 'aten::lerp', 'aten::real',
    'aten::imag', 'aten::view_as_real_copy', 'aten::glu_jvp', 'aten::bucketize',
)(pointwise)  # fmt: skip


@rule(
    'aten::zeros_like', 'aten::ones_like', 'aten::empty_like', 'aten::full_like',
)  # fmt: skip
def fill_like(call: Call) -> None:
    """A constant of another tensor's shape follows that shape."""
    call.label(call.out, dict(call.labels(call['self'])))
    call.tracer.set_uniform(call.out)


@rule(
    'aten::rand_like', 'aten::randn_like', 'aten::randint_like', 'aten::bernoulli_',
    'aten::bernoulli', 'aten::normal_', 'aten::uniform_', 'aten::random_', 'aten::exponential_',
)  # fmt: skip
def random_like(call: Call) -> None:
    call.label(call.out, dict(call.labels(call['self'])))


@rule(
    'aten::zeros', 'aten::ones', 'aten::full', 'aten::empty', 'aten::new_zeros', 'aten::new_ones',
    'aten::new_full', 'aten::new_empty', 'aten::scalar_tensor',
)  # fmt: skip
def fill(call: Call) -> None:
    """The same at every position, so it fits every width that the code asks of it."""
    call.tracer.set_uniform(call.out)
