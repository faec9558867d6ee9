"""A plan: what to keep of a model, as data. Made apart from being applied.

For every tensor that a cut narrows it holds, for each dimension, the kept indices *of the original*;
beside that the module attributes that change, and the history of cuts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmprune.errors import PruneError
from mmprune.slots import named_state

FORMAT = 1
"""Version of ``meta['mmprune']``. Readers refuse later ones."""

Keep = dict[str, dict[int, list[int]]]
Fingerprint = dict[str, list[int]]


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    ``keep``: {tensor name: {dimension: kept original indices, ascending}} for every parameter and
    buffer that was cut; ``attributes``: {module name: {attribute: value}}; ``fingerprint``: names
    and shapes of the original's state; ``history``: one dict for each cut; ``budget``: what was
    asked for.
    """

    keep: Keep
    attributes: dict[str, dict[str, int]]
    fingerprint: Fingerprint
    history: list[dict[str, Any]] = field(default_factory=list)
    budget: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        last = self.history[-1] if self.history else {}
        told = ', '.join(f'{key} {value:,}' for key, value in last.items() if isinstance(value, int))
        return f'Plan({len(self.keep)} tensors narrower after {len(self.history)} cuts; {told})'

    def apply(self, model: nn.Module, optimizer: Any = None, twins: Iterable[nn.Module] = ()) -> None:
        """Narrows ``model`` in place: parameters stay the same objects, the optimizer's state and
        ``twins`` (averaged copies) follow. All or nothing.

        Raises:
            PruneError: the model is not the plan's original; the first differences are listed.
        """
        from mmprune.cut import cut

        cut(model, self, optimizer, twins)

    def then(self, second: Plan) -> Plan:
        """This plan and, after it, one made for the model that it leaves, as a single plan."""
        keep = {name: dict(dims) for name, dims in self.keep.items()}
        for name, dims in second.keep.items():
            for dim, indices in dims.items():
                before = keep.get(name, {}).get(dim)
                kept = indices if before is None else [before[i] for i in indices]
                keep.setdefault(name, {})[dim] = kept
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in second.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Plan(
            keep, attributes, self.fingerprint, self.history + second.history,
            second.budget or self.budget,
        )  # fmt: skip

    def removed(self, name: str, dim: int) -> list[int]:
        """The original indices that go from one dimension of a tensor."""
        kept = set(self.keep[name][dim])
        return [i for i in range(self.fingerprint[name][dim]) if i not in kept]

    def to_meta(self) -> dict[str, Any]:
        """Plain ints, strings, lists and dicts, for a checkpoint's ``meta['mmprune']``."""
        from mmprune import __version__

        return {
            'format': FORMAT,
            'mmprune': __version__,
            'fingerprint': {name: list(shape) for name, shape in self.fingerprint.items()},
            'keep': {
                name: {dim: list(kept) for dim, kept in dims.items()}
                for name, dims in self.keep.items()
            },
            'attributes': {name: dict(values) for name, values in self.attributes.items()},
            'history': [dict(entry) for entry in self.history],
            'budget': dict(self.budget),
        }

    @classmethod
    def from_meta(cls, meta: Any) -> Plan:
        """The plan that :meth:`to_meta` wrote, every part of it checked.

        Raises:
            PruneError: damaged, of a later format, or not a plan; the message names the part.
        """
        _check_meta(meta)
        return cls(
            keep={
                name: {dim: list(kept) for dim, kept in dims.items()}
                for name, dims in meta['keep'].items()
            },
            attributes={name: dict(values) for name, values in meta['attributes'].items()},
            fingerprint={name: list(shape) for name, shape in meta['fingerprint'].items()},
            history=[dict(entry) for entry in meta['history']],
            budget=dict(meta['budget']),
        )


def fingerprint(model: nn.Module) -> Fingerprint:
    """Names and shapes of all parameters and buffers."""
    return {name: list(tensor.shape) for name, tensor in named_state(model)}


def check_fingerprint(expected: Fingerprint, model: nn.Module, what: str) -> None:
    """Raises a PruneError that lists the first differences by name and shape."""
    found = fingerprint(model)
    differences = [
        f'{name}: {what} has {_shape(expected.get(name))}, the model {_shape(found.get(name))}'
        for name in list(expected) + [n for n in found if n not in expected]
        if expected.get(name) != found.get(name)
    ]
    if differences:
        shown = '\n  '.join(differences[:5])
        more = f'\n  and {len(differences) - 5} more' if len(differences) > 5 else ''
        raise PruneError(
            f'{what} was made for another architecture: {len(differences)} of {len(expected)} '
            f'tensors differ:\n  {shown}{more}\nBuild the model from the unpruned config that '
            f'{what} was made with.'
        )


def _shape(shape: list[int] | None) -> str:
    return 'none' if shape is None else f'({", ".join(map(str, shape))})'


def plan_of(model: nn.Module) -> Plan | None:
    """The plan by which ``model`` was cut, against its original; ``None`` if it never was."""
    return getattr(model, '_mmprune_plan', None)


def set_plan(model: nn.Module, plan: Plan | None) -> None:
    if plan is None:
        vars(model).pop('_mmprune_plan', None)
    else:
        model._mmprune_plan = plan


# -- reading what a stranger wrote ----------------------------------------------------------------

_PARTS = {
    'format': int, 'mmprune': str, 'fingerprint': dict, 'keep': dict, 'attributes': dict,
    'history': list, 'budget': dict,
}  # fmt: skip
_ATTRIBUTE = re.compile(r'[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*')


def _bad(where: str, found: Any, wanted: str) -> PruneError:
    text = repr(found)
    text = text if len(text) <= 80 else text[:77] + '...'
    return PruneError(
        f"meta['mmprune']{where} is {text}, not {wanted}: the file is damaged or was not written by "
        'mmprune; use another checkpoint'
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_meta(meta: Any) -> None:
    if not isinstance(meta, dict):
        raise _bad('', meta, 'a dict')
    if _is_int(meta.get('format')) and meta['format'] > FORMAT:
        raise PruneError(
            f"meta['mmprune'] has format {meta['format']}, this mmprune reads up to {FORMAT}: it was "
            f'written by mmprune {str(meta.get("mmprune"))[:40]}; install that version or a later one'
        )
    for part, kind in _PARTS.items():
        if not isinstance(meta.get(part), kind) or isinstance(meta.get(part), bool):
            raise _bad(f'[{part!r}]', meta.get(part), f'of type {kind.__name__}')
    if meta['format'] != FORMAT:
        raise _bad("['format']", meta['format'], str(FORMAT))
    for name, shape in meta['fingerprint'].items():
        if (
            not isinstance(name, str)
            or not isinstance(shape, list)
            or not all(_is_int(n) and n >= 0 for n in shape)
        ):
            raise _bad(f"['fingerprint'][{name!r}]", shape, 'a shape')
    for name, dims in meta['keep'].items():
        shape = meta['fingerprint'].get(name)
        if shape is None or not isinstance(dims, dict):
            raise _bad(f"['keep'][{name!r}]", dims, 'a dict of a tensor in the fingerprint')
        for dim, kept in dims.items():
            at = f"['keep'][{name!r}][{dim!r}]"
            if not _is_int(dim) or not 0 <= dim < len(shape):
                raise _bad(at, kept, f'for a dimension below {len(shape)}')
            if (
                not isinstance(kept, list)
                or not 0 < len(kept) <= shape[dim]
                or not all(map(_is_int, kept))
            ):
                raise _bad(at, kept, f'a list of 1 to {shape[dim]} indices')
            if (
                kept[0] < 0
                or kept[-1] >= shape[dim]
                or any(b <= a for a, b in zip(kept, kept[1:], strict=False))
            ):
                raise _bad(at, kept, f'ascending indices from 0 to {shape[dim] - 1}')
    for name, values in meta['attributes'].items():
        if not isinstance(name, str) or not isinstance(values, dict):
            raise _bad(f"['attributes'][{name!r}]", values, 'a dict of a module')
        for attribute, value in values.items():
            good = isinstance(attribute, str) and _ATTRIBUTE.fullmatch(attribute)
            if not good or '__' in attribute or not _is_int(value) or value < 1:
                raise _bad(f"['attributes'][{name!r}][{attribute!r}]", value, 'a positive width')
    for number, entry in enumerate(meta['history']):
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise _bad(f"['history'][{number}]", entry, 'a dict')


def narrowed(tensor: torch.Tensor, dims: dict[int, list[int]]) -> torch.Tensor:
    """A copy of ``tensor`` with the kept indices of each dimension, in its memory format."""
    out = tensor.detach()
    for dim, kept in dims.items():
        out = out.index_select(dim, torch.tensor(kept, device=out.device))
    if tensor.ndim == 4 and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out
