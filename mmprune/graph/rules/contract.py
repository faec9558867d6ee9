"""Contractions: convolutions and matrix products, the only operations that sum channels away."""

import math

import numpy as np
import torch

from mmprune.graph.call import Call
from mmprune.graph.locks import LockKind
from mmprune.graph.outcome import ZERO_MOVES, ZERO_STAYS, Outcome, Returned, first_output
from mmprune.graph.registry import aten
from mmprune.graph.rules.pointwise import Operand, broadcast, operand
from mmprune.graph.slots import Ids, Labels


def contract(
    call: Call, x: torch.Tensor, a: tuple[Ids, ...], w: torch.Tensor, b: tuple[Ids, ...]
) -> None:
    """Ties the two factors of a sum over channels. On the summed dimension ``x`` carries the channels
    ``a``, and ``w``, which usually is a weight, carries ``b``."""
    if not a and not b:
        return
    if a and not b:
        call.lock(a, LockKind.FIXED_MATRIX)
    elif b and not a:
        if x.numel():  # a batch without proposals is empty, and then nothing is read
            call.lock(b, LockKind.INPUT_CHANNELS)
    else:
        call.tie(a, b, LockKind.FIXED_CHANNEL_READ)
        if not call.zero_safe(x) and not call.zero_safe(w):
            free = tuple(ids for ids in a + b if not call.all_locked(ids))
            call.lock(free, LockKind.ZERO_ON_NEITHER_SIDE)
    if call.is_weight(w):  # then x is the input of a layer, even if x is a parameter (learned queries)
        call.read(a)
    else:
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
) -> Outcome:
    """Applies the rule of a convolution of any rank and grouping; compiled convolutions use it too.

    All groups lose the same positions, so that they keep one width. A depthwise convolution (one
    channel in each group) ties its inputs to its outputs and loses whole groups.

    ``x`` is (N, C_in, ...), ``out`` is (N, C_out, ...) and ``weight`` is (C_out, C_in / groups, ...) or
    (C_in, C_out / groups, ...) if the convolution is transposed.
    """
    weight_labels = call.labels(weight)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    rows, columns = call.ids(weight, 0), call.ids(weight, 1)
    call.lock_tensor(weight, LockKind.KERNEL, dims=range(2, weight.ndim))
    call.lock_tensor(x, LockKind.SPATIAL, dims=range(2, x.ndim))
    channels, samples = call.ids(x, 1), call.ids(x, 0)
    n_in, n_out = x.shape[1], out.shape[1]
    depthwise = groups > 1 and groups == n_in

    if groups == 1:
        reads, gives = weight_labels.get(in_dim, ()), weight_labels.get(out_dim, ())
        contract(call, x, channels, weight, reads)
    elif depthwise:
        # The weight has one row for each output (for each input, if transposed). Input i makes the
        # outputs from i * n_out / groups on, and all of these are one unit with it.
        per_group = rows[0].size // groups if rows else 1
        reads = tuple(ids[::per_group] for ids in rows)
        for ids in rows:
            call.tie_all(ids.reshape(groups, per_group).T)
        if transposed:
            call.lock(columns, LockKind.GROUPED_TRANSPOSED)
        # The channel is passed on and not mixed with others, so the weight does not consume it.
        call.tie(channels, reads, LockKind.FIXED_CHANNEL_READ)
        gives = tuple(np.repeat(ids, n_out // groups) for ids in reads)
    else:
        for ids in rows + channels:
            call.tie_all(ids.reshape(groups, -1))
        if transposed:
            reads, gives = rows, tuple(np.tile(ids, groups) for ids in columns)
        else:
            reads, gives = tuple(np.tile(ids, groups) for ids in columns), rows
        contract(call, x, channels, weight, reads)
    if groups > 1:  # a depthwise convolution loses groups, any other keeps their number
        call.bind_number('groups', channels if depthwise else ())
    call.tie_if(gives, bias)
    positions = (x if transposed else out).numel() / (n_in if transposed else n_out)
    call.multiply_adds(positions * math.prod(weight.shape), rows, columns)
    # A row of zeros in the weight makes zeros of any input; a depthwise weight also keeps zeros.
    safe = call.zero_safe(weight) or depthwise and call.zero_safe(x)
    if bias is not None:
        safe = safe and call.zero_safe(bias) and not samples
    labels: Labels = {1: gives, 0: samples} if samples else {1: gives}
    return Outcome(labels, ZERO_STAYS if safe else ZERO_MOVES)


@aten('convolution', is_contraction=True)
def convolution(call: Call) -> Returned:
    x, weight, bias = call['input'], call['weight'], call['bias']
    transposed = call.args.get('transposed', False)
    return convolve(call, x, weight, bias, call.out, call['groups'], transposed)


def matrix_product(call: Call, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Outcome:
    """Applies the rule of the product of ``a`` (..., M, K) and ``b`` (..., K, N), whose leading
    dimensions are equal."""
    n = a.ndim
    contract(call, a, call.ids(a, n - 1), b, call.ids(b, n - 2))
    labels = broadcast(call, [_leading(call, a, n - 2), _leading(call, b, n - 2)], out.shape[: n - 2])
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
    # A channel that is not summed is zero where the factor that carries it is zero.
    moves = any(
        not call.zero_safe(t) and set(call.labels(t)) - {d} for t, d in ((a, n - 1), (b, n - 2))
    )
    return Outcome(labels, ZERO_MOVES if moves else ZERO_STAYS)


def _leading(call: Call, tensor: torch.Tensor, dims: int) -> Operand:
    """Returns the first ``dims`` dimensions of a tensor as an operand."""
    labels = {d: ids for d, ids in call.labels(tensor).items() if d < dims}
    return Operand(tensor.shape[:dims], labels, [d for d in call.broadcast_dims(tensor) if d < dims])


@aten('mm bmm', is_contraction=True)
def mm(call: Call) -> Returned:
    return matrix_product(call, call['self'], call['mat2'], call.out)


@aten('addmm baddbmm', is_contraction=True)
def addmm(call: Call) -> Returned:
    a = call.args.get('mat1', call.args.get('batch1'))
    b = call.args.get('mat2', call.args.get('batch2'))
    return _add(call, matrix_product(call, a, b, call.out))


def _add(call: Call, product: Outcome) -> Outcome:
    """Returns the outcome of ``product`` plus the argument ``self``, a bias."""
    bias, shape = call['self'], call.out.shape
    bias_dims = {d + len(shape) - bias.ndim for d in call.labels(bias)}
    labels = broadcast(call, [operand(call, bias), Operand(shape, product.labels)], shape)
    safe = product.zero is ZERO_STAYS and call.zero_safe(bias) and bias_dims.issuperset(labels)
    return Outcome(labels, ZERO_STAYS if safe else ZERO_MOVES)


@aten('mv dot vdot addmv', is_contraction=True)
def mv(call: Call) -> Returned:
    """Applies the rule of a product with a vector: a contraction of ``a`` (..., K) with ``b`` (K,)."""
    a = call.args.get('mat', call['self'])
    b = call.args.get('vec', call.args.get('tensor', call.args.get('other')))
    contract(call, a, call.ids(a, -1), b, call.ids(b, 0))
    labels = {0: call.ids(a, 0)} if a.ndim == 2 else {}
    call.multiply_adds(a.numel(), call.ids(a, -1), labels.get(0, ()))
    moves = not call.zero_safe(a) and bool(labels.get(0))
    product = Outcome(labels, ZERO_MOVES if moves else ZERO_STAYS)
    return _add(call, product) if call.name == 'aten::addmv' else product


def heads_of(call: Call, tensor: torch.Tensor, count: int) -> Operand:
    """Returns the heads of a query, key, value or mask (..., H, N, D) as an operand that matches
    ``count`` heads of the query.

    With grouped queries (``enable_gqa=True``) there are fewer heads of keys and values than of the
    query. Each then serves ``count / H`` neighbouring heads of the query, which form one unit with it.
    """
    dim = tensor.ndim - 3
    heads = operand(call, tensor, [d for d in range(tensor.ndim) if d != dim])
    n_heads = heads.shape[dim] if dim >= 0 else 1
    if n_heads in (1, count) or count % n_heads:
        return heads
    shape = [count if d == dim else size for d, size in enumerate(heads.shape)]
    labels = {
        d: tuple(np.repeat(array, count // n_heads) for array in ids) for d, ids in heads.labels.items()
    }
    return heads._replace(shape=shape, labels=labels)


@aten(
    '_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention '
    '_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention'
)
def attention(call: Call) -> Returned:
    """Locks the width D of queries and keys (B, H, N, D) unless the caller gives a scale, because the
    kernel then computes the scale from D. The width of the values is free."""
    query, key, value = call['query'], call['key'], call['value']
    if call.args.get('scale') is None:
        call.lock_tensor(query, LockKind.ATTENTION_SCALE, dims=[3])
        call.lock_tensor(key, LockKind.ATTENTION_SCALE, dims=[3])
    contract(call, query, call.ids(query, 3), key, call.ids(key, 3))
    for tensor in (query, key, value):
        call.lock_tensor(tensor, LockKind.ATTENTION, dims=[0, 2])
    mask = call.args.get('attn_mask', call.args.get('attn_bias'))
    tensors = [tensor for tensor in (query, key, value, mask) if tensor is not None]
    heads = [heads_of(call, tensor, query.shape[1]) for tensor in tensors]
    labels = broadcast(call, heads, query[..., :1, :1].shape)
    if mask is not None:
        other_dims = [d for d in range(mask.ndim) if d != mask.ndim - 3]
        call.lock_tensor(mask, LockKind.ATTENTION_MASK, dims=other_dims)
    count = query[..., 0].numel() * key.shape[2]
    call.multiply_adds(count * query.shape[3], call.ids(query, 3), call.ids(query, 1))
    call.multiply_adds(count * value.shape[3], call.ids(value, 3), call.ids(query, 1))
    zero = ZERO_STAYS if call.zero_safe(value) else ZERO_MOVES
    return first_output(call.out, Outcome(labels | {3: call.ids(value, 3)}, zero))
