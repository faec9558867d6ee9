"""A plan: what to keep of a model, as data. Made apart from being applied.

For every tensor that a cut narrows it holds, for each dimension, the kept indices *of the original*;
beside that the module attributes that change, and the history of cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from mmprune._version import __version__
from mmprune.errors import PruneError
from mmprune.graph.slots import aliases_of
from mmprune.surgery.apply import cut
from mmprune.surgery.format import FORMAT, check_meta, checksum
from mmprune.surgery.history import CutRecord
from mmprune.surgery.parts import innermost, stored_plan
from mmprune.surgery.structure import (
    Fingerprint,
    Keep,
    check_fingerprint,
    fingerprint,
    names_by_first,
    shape_text,
)

__all__ = ['Plan', 'check_fingerprint', 'fingerprint', 'plan_of']


@dataclass(frozen=True)
class Plan:
    """What stays of a model: data, made apart from being applied.

    Args:
        keep: {tensor name: {dimension: kept original indices, ascending}} for every parameter and
            buffer that was cut.
        attributes: {module name: {attribute: value}} of the widths that modules keep as numbers.
        fingerprint: {tensor name: shape} of the original's parameters and buffers.
        cuts: what each cut did, the first one first.
        budget: what was asked for in the last one, as plain data (:meth:`Budget.to_meta`; a later
            version may know other options).
        aliases: {further name of a tensor: its first name}. Of such names a model may have some and
            lack others, since code may give a module a second name while it runs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> x = torch.zeros(1, 3, 5, 5)
        >>> plan = mmprune.prune(model, lambda m: m(x), prune_num=4, divisor=4)
        >>> plan.fingerprint['0.weight'], len(plan.keep['0.weight'][0])
        ([8, 3, 3, 3], 4)
        >>> plan.cuts[-1].units_removed, plan.cuts[-1].params_before, plan.cuts[-1].params
        (4, 242, 122)
        >>> mmprune.Plan.from_meta(plan.to_meta()) == plan
        True
    """

    keep: Keep
    attributes: dict[str, dict[str, int]]
    fingerprint: Fingerprint
    cuts: list[CutRecord] = field(default_factory=list)
    budget: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        last = self.cuts[-1].to_meta() if self.cuts else {}
        told = ', '.join(f'{key} {value:,}' for key, value in last.items() if isinstance(value, int))
        return f'Plan({len(self.keep)} tensors narrower after {len(self.cuts)} cuts; {told})'

    @property
    def history(self) -> list[dict[str, Any]]:
        """``cuts`` as plain dicts, as a checkpoint and a report have them."""
        return [record.to_meta() for record in self.cuts]

    def apply(
        self, model: nn.Module, optimizer: Any = None, ema_models: Iterable[nn.Module] = ()
    ) -> None:
        """Narrows ``model`` in place: parameters stay the same objects. All or nothing.

        Args:
            model: the plan's original, as it was before the first cut; or a copy of it that earlier
                cuts of this plan were made to, which gets the later ones (an average of the weights,
                say, after each call of :func:`mmprune.prune`).
            optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of
                these; state of a parameter's shape is sliced with it.
            ema_models: EMA models, which are cut alike.

        Raises:
            PruneError: the model is not the plan's original; the first differences are listed.
        """
        before = plan_of(model)
        cut(model, self if before is None else self.since(before), optimizer, ema_models)

    def since(self, before: Plan) -> Plan:
        """What is left to do of this plan for a model that was cut by ``before``; the plan itself if it
        was made for such a model, or does not begin with the cuts of ``before``."""
        second = self.with_aliases(before.aliases)
        shapes = before.shapes_left()
        if second.fingerprint == shapes or second.fingerprint != before.fingerprint:
            return self
        keep: Keep = {}
        for name, shape in second.fingerprint.items():
            for dim, size in enumerate(shape):
                held = before.keep.get(name, {}).get(dim, range(size))
                kept = second.keep.get(name, {}).get(dim, range(size))
                if not set(kept) <= set(held):
                    return self
                if len(kept) < len(held):
                    keep.setdefault(name, {})[dim] = np.searchsorted(held, kept).tolist()
        if not keep:
            return self
        cuts = self.cuts[len(before.cuts) :]
        return replace(second, keep=keep, fingerprint=shapes, cuts=cuts)

    def then(self, second: Plan) -> Plan:
        """This plan and, after it, one made for the model that it leaves, as a single plan."""
        first, second = self.with_aliases(second.aliases), second.with_aliases(self.aliases)
        left, wanted = first.shapes_left(), second.fingerprint
        wrong = [name for name in [*left, *wanted] if left.get(name) != wanted.get(name)]
        if wrong:
            raise PruneError(
                f'the second plan was made for {wrong[0]} of shape '
                f'{shape_text(wanted.get(wrong[0]))}, the first leaves '
                f'{shape_text(left.get(wrong[0]))}: they do not follow each other'
            )
        keep = {name: dict(dims) for name, dims in first.keep.items()}
        for name, dims in second.keep.items():
            for dim, indices in dims.items():
                before = keep.get(name, {}).get(dim)
                kept = indices if before is None else [before[i] for i in indices]
                keep.setdefault(name, {})[dim] = kept
        attributes = {name: dict(values) for name, values in self.attributes.items()}
        for name, values in second.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Plan(
            keep,
            attributes,
            first.fingerprint,
            self.cuts + second.cuts,
            second.budget or self.budget,
            first.aliases | second.aliases,
        )

    def with_aliases(self, aliases: dict[str, str]) -> Plan:
        """The same plan, in which tensors have further names as well: {name: another}."""
        if aliases.items() <= self.aliases.items():
            return self
        shapes, keep, found = dict(self.fingerprint), dict(self.keep), {}
        for first, names in names_by_first(self.aliases | aliases).items():
            known = next((name for which in (keep, shapes) for name in names if name in which), None)
            if known is None:
                continue
            for name in names:
                shapes.setdefault(name, shapes[known])
                if known in keep:
                    keep.setdefault(name, keep[known])
                if name != first:
                    found[name] = first
        return replace(self, keep=keep, fingerprint=shapes, aliases=found)

    def shapes_left(self) -> Fingerprint:
        """{tensor name: shape} of what stays."""
        left = {name: list(shape) for name, shape in self.fingerprint.items()}
        for name, dims in self.keep.items():
            for dim, kept in dims.items():
                left[name][dim] = len(kept)
        return left

    def module_names(self, name: str) -> list[str]:
        """Other names that a module has by the plan's aliases."""
        found = []
        for pair in self.aliases.items():
            parts = [one.split('.') for one in pair]
            while parts[0] and parts[1] and parts[0].pop() == parts[1].pop():
                own = ['.'.join(part) for part in parts]
                found += [other for one, other in (own, own[::-1]) if one == name]
        return found

    def removed(self, name: str, dim: int) -> list[int]:
        """The original indices that go from one dimension of a tensor."""
        gone = np.ones(self.fingerprint[name][dim], dtype=bool)
        gone[self.keep[name][dim]] = False
        return np.flatnonzero(gone).tolist()

    def to_meta(self) -> dict[str, Any]:
        """Plain ints, strings, lists and dicts, for a checkpoint's ``meta['mmprune']``."""
        meta = {
            'format': FORMAT,
            'mmprune': __version__,
            'fingerprint': {name: list(shape) for name, shape in self.fingerprint.items()},
            'keep': {
                name: {dim: list(kept) for dim, kept in dims.items()}
                for name, dims in self.keep.items()
            },
            'attributes': {name: dict(values) for name, values in self.attributes.items()},
            'history': self.history,
            'budget': dict(self.budget),
        }
        if self.aliases:
            meta['aliases'] = dict(self.aliases)
        return meta | {'checksum': checksum(meta)}

    @classmethod
    def from_meta(cls, meta: Any) -> Plan:
        """The plan that :meth:`to_meta` wrote, every part of it checked.

        Raises:
            PruneError: corrupt, of a later format, or not a plan; the message names the part.
        """
        check_meta(meta)
        return cls(
            keep={
                name: {dim: list(kept) for dim, kept in dims.items()}
                for name, dims in meta['keep'].items()
            },
            attributes={name: dict(values) for name, values in meta['attributes'].items()},
            fingerprint={name: list(shape) for name, shape in meta['fingerprint'].items()},
            cuts=[CutRecord.from_meta(entry) for entry in meta['history']],
            budget=dict(meta['budget']),
            aliases=dict(meta.get('aliases', {})),
        )


def plan_of(model: nn.Module) -> Plan | None:
    """The plan by which ``model`` was cut, against its original.

    Args:
        model: pruned or not, or a wrapper around it (``torch.compile``, ``DataParallel``). A part of
            a pruned model has the part of the plan that is about it.

    Returns:
        All its cuts as one plan; ``None`` where there was none.

    Example:
        >>> from torch import nn
        >>> mmprune.plan_of(nn.Conv2d(3, 8, 3)) is None
        True
    """
    plan = stored_plan(model)
    return plan if plan is None else plan.with_aliases(aliases_of(innermost(model)))
