"""Contractions: convolutions and matrix products. The only places where channels are read away."""

import math

import numpy as np
import torch

from mmprune.graph.registry import Call, Ids, Labels, rule
from mmprune.graph.rules.pointwise import broadcast, part


def contract(
    call: Call, x: torch.Tensor, a: tuple[Ids, ...], w: torch.Tensor, b: tuple[Ids, ...]
) -> None:
    """Ties the two sides of a sum over channels: ``x`` carries ``a`` there, ``w`` carries ``b``."""
    if not a and not b:
        return
    if a and not b:
        call.lock(a, 'multiplied with a matrix of fixed width')
    elif b and not a:
        if x.numel():  # of no proposals nothing is read
            call.lock(b, 'reads a tensor of fixed width')
    else:
        call.tie(a, b, 'reads a fixed channel')
        if call.tracer.is_nonzero(x) and call.tracer.is_nonzero(w):
            call.lock(a + b, 'a product in which a removed channel would be zero on neither side')
    call.consume(x, a)
    call.consume(w, b)


def convolve(
    call: Call,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    groups: int,
    transposed: bool = False,
) -> None:
    """A convolution of any rank and grouping; also the rule of the compiled ones.

    ``x``: (N, C_in, ...), ``weight``: (C_out, C_in / groups, ...), or (C_in, C_out / groups, ...)
    where ``transposed``. In each group the same positions go. A depthwise one (one channel in
    each group) ties inputs to outputs, and loses groups.
    """
    weight_labels = call.labels(weight)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    rows, columns = call.ids(weight, 0), call.ids(weight, 1)
    call.lock_tensor(weight, '', dims=range(2, weight.ndim))
    call.lock_tensor(x, 'convolved over', dims=range(2, x.ndim))
    channels = call.ids(x, 1)
    n_in, n_out = x.shape[1], out.shape[1]
    depthwise = groups > 1 and groups == n_in

    if groups == 1:
        reads, gives = weight_labels.get(in_dim, ()), weight_labels.get(out_dim, ())
        contract(call, x, channels, weight, reads)
    elif depthwise:
        # One row of the weight for each output (or input, transposed): input i makes outputs
        # i * n_out / groups and on, all of one unit with it.
        per = rows[0].size // groups if rows else 1
        reads = tuple(ids[::per] for ids in rows)
        for ids in rows:
            call.tie_all(ids.reshape(groups, per).T)
        if transposed:
            call.lock(columns, 'multiplies channels in a grouped transposed convolution')
        # It passes a channel on and mixes it with no other, so it is no reader of it.
        call.tie(channels, reads, 'a depthwise convolution of a fixed channel')
        gives = tuple(np.repeat(ids, n_out // groups) for ids in reads)
    else:
        # The same position of every group is one unit, so that all groups keep one width.
        for ids in rows + channels:
            call.tie_all(ids.reshape(groups, -1))
        if transposed:
            reads, gives = rows, tuple(np.tile(ids, groups) for ids in columns)
        else:
            reads, gives = tuple(np.tile(ids, groups) for ids in columns), rows
        contract(call, x, channels, weight, reads)
    call.tie_if(gives, bias)
    labels: Labels = {1: gives}
    if call.ids(x, 0):
        labels[0] = call.ids(x, 0)
    call.label(out, labels)
    nonzero = [call.tracer.is_nonzero(t) for t in (x, weight, bias) if t is not None]
    nonzero[:2] = [all(nonzero[:2])] if depthwise else nonzero[1:2]
    call.nonzero(out, any(nonzero) or bool(call.ids(x, 0) and bias is not None))
    positions = (x if transposed else out).numel() / (n_in if transposed else n_out)
    call.multiply_adds(positions * math.prod(weight.shape), rows, columns)


@rule('aten::convolution')
def convolution(call: Call) -> None:
    convolve(
        call,
        call['input'],
        call['weight'],
        call['bias'],
        call.out,
        call['groups'],
        call.args.get('transposed', False),
    )


def matrix_product(call: Call, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Labels:
    """``a``: (..., M, K), ``b``: (..., K, N), with equal leading dimensions."""
    n = a.ndim
    contract(call, a, call.ids(a, n - 1), b, call.ids(b, n - 2))
    labels = broadcast(
        call,
        [_select(call, a, n - 2), _select(call, b, n - 2)],
        out.shape[: n - 2],
        [{d: ids for d, ids in call.labels(t).items() if d < n - 2} for t in (a, b)],
    )
    if call.ids(a, n - 2):
        labels[n - 2] = call.ids(a, n - 2)
    if call.ids(b, n - 1):
        labels[n - 1] = call.ids(b, n - 1)
    call.multiply_adds(
        out.numel() * a.shape[-1],
        labels.get(n - 1, ()),
        call.ids(b, n - 2) or call.ids(a, n - 1),
        *(labels.get(d, ()) for d in range(n - 1)),
    )
    sides = ((a, n - 1), (b, n - 2))
    call.nonzero(out, any(call.tracer.is_nonzero(t) and set(call.labels(t)) - {d} for t, d in sides))
    return labels


def _select(call: Call, tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """The leading dimensions alone, for a check of shapes."""
    if not tensor.numel():
        return tensor
    return part(call, tensor[(...,) + (0,) * (tensor.ndim - dims)], tensor)


@rule('aten::mm', 'aten::bmm')
def mm(call: Call) -> None:
    call.label(call.out, matrix_product(call, call['self'], call['mat2'], call.out))


@rule('aten::addmm', 'aten::baddbmm')
def addmm(call: Call) -> None:
    a = call.args.get('mat1', call.args.get('batch1'))
    b = call.args.get('mat2', call.args.get('batch2'))
    added = matrix_product(call, a, b, call.out)
    _add(call, added)


def _add(call: Call, product: Labels) -> None:
    """``self`` is added to a product that carries the labels ``product``."""
    bias, nonzero = call['self'], call.tracer.is_nonzero(call.out)
    own = {d + call.out.ndim - bias.ndim for d in call.labels(bias)}
    labels = broadcast(call, [bias, call.out], call.out.shape, [call.labels(bias), product])
    call.label(call.out, labels)
    call.nonzero(call.out, nonzero or call.tracer.is_nonzero(bias) or not own.issuperset(labels))


@rule('aten::mv', 'aten::dot', 'aten::addmv')
def mv(call: Call) -> None:
    a = call.args.get('mat', call['self'])
    b = call.args.get('vec', call.args.get('tensor'))
    contract(call, a, call.ids(a, -1), b, call.ids(b, 0))
    labels = {0: call.ids(a, 0)} if a.ndim == 2 else {}
    call.label(call.out, labels)
    call.nonzero(call.out, call.tracer.is_nonzero(a) and bool(labels.get(0)))
    if call.name == 'aten::addmv':
        _add(call, labels)
    call.multiply_adds(a.numel(), call.ids(a, -1), labels.get(0, ()))


@rule(
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
)
def attention(call: Call) -> None:
    """Query and key (B, H, N, D): the scale is taken from D, so D is locked for them unless the
    caller gave one; the value's width is free."""
    query, key, value = call['query'], call['key'], call['value']
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    if call.args.get('scale') is None:
        call.lock_tensor(query, 'the scale of attention depends on its width', dims=[3])
        call.lock_tensor(key, 'the scale of attention depends on its width', dims=[3])
    contract(call, query, call.ids(query, 3), key, call.ids(key, 3))
    for tensor in (query, key, value):
        call.lock_tensor(tensor, 'attention runs over it', dims=[0, 2])
    mask = call.args.get('attn_mask', call.args.get('attn_bias'))
    operands = [part(call, t[..., :1, :1], t) for t in (query, key, value, mask) if t is not None]
    heads = [
        {d: i for d, i in call.labels(t).items() if d == t.ndim - 3}
        for t in (query, key, value, mask)
        if t is not None
    ]
    labels = broadcast(call, operands, query[..., :1, :1].shape, heads)
    if mask is not None:
        own = [d for d in range(mask.ndim) if d != mask.ndim - 3]
        call.lock_tensor(mask, 'added to attention', dims=own)
    call.label(out, labels | {3: call.ids(value, 3)})
    call.nonzero(out, call.tracer.is_nonzero(value))
    count = query[..., 0].numel() * key.shape[2]
    call.multiply_adds(count * query.shape[3], call.ids(query, 3), call.ids(query, 1))
    call.multiply_adds(count * value.shape[3], call.ids(value, 3), call.ids(query, 1))
