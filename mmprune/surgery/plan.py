"""Plans: what stays of a model, as data, made before anything is touched and stored in checkpoints.

For every tensor that was cut, a plan holds the kept indices *of the original* in each dimension. It
also holds the module attributes that changed, and the record of each cut. Example: a convolution of 8
channels that keeps four has ``keep['0.weight'] = {0: [0, 2, 3, 7]}`` and
``attributes['0'] = {'out_channels': 4}``.
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
from mmprune.surgery.structure import Fingerprint, Keep, names_by_first, shape_text


@dataclass(frozen=True)
class Plan:
    """What stays of a model, as data.

    Args:
        keep: {tensor name: {dimension: kept original indices, ascending}} for every parameter and
            buffer that was cut.
        attributes: {module name: {attribute: value}} for the widths that modules keep as numbers.
        fingerprint: {tensor name: shape} of all parameters and buffers of the original.
        cuts: the record of each cut, the first cut first.
        budget: the options of the last budget as plain data (:meth:`Budget.to_meta`). A later version
            may have written options that this version does not know.
        aliases: {further name of a tensor: its first name}. A model needs only one of the names,
            since some code gives a module a second name while it runs.

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
        counts = ', '.join(f'{key} {value:,}' for key, value in last.items() if isinstance(value, int))
        return f'Plan({len(self.keep)} tensors narrower after {len(self.cuts)} cuts; {counts})'

    @property
    def history(self) -> list[dict[str, Any]]:
        """``cuts`` as plain dicts, as checkpoints and reports hold them."""
        return [record.to_meta() for record in self.cuts]

    def apply(
        self, model: nn.Module, optimizer: Any = None, ema_models: Iterable[nn.Module] = ()
    ) -> None:
        """Narrows ``model`` in place. Its parameters stay the same objects. A failure changes nothing.

        Args:
            model: the plan's original, uncut; or a copy that earlier cuts of this plan were applied to,
                such as an average of the weights, to which only the later cuts are applied.
            optimizer: a torch optimizer, an mmengine ``OptimWrapper``, a scheduler, or a list of
                these. State that has the shape of its parameter is sliced with it.
            ema_models: EMA models, which are cut in the same way.

        Raises:
            PruneError: the model is not the plan's original. The message lists the first differences.
        """
        before = plan_of(model)
        cut(model, self if before is None else self.since(before), optimizer, ema_models)

    def since(self, before: Plan) -> Plan:
        """Returns the part of this plan that comes after the cuts of ``before``.

        Returns:
            A plan for the model that ``before`` leaves. It is this plan unchanged if that was made for
            such a model, or if it does not begin with the cuts of ``before``.
        """
        plan = self.with_aliases(before.aliases)
        shapes = before.shapes_left()
        if plan.fingerprint == shapes or plan.fingerprint != before.fingerprint:
            return self
        keep: Keep = {}
        for name, shape in plan.fingerprint.items():
            for dim, size in enumerate(shape):
                kept_before = before.keep.get(name, {}).get(dim, range(size))
                kept = plan.keep.get(name, {}).get(dim, range(size))
                if not set(kept) <= set(kept_before):
                    return self
                if len(kept) < len(kept_before):
                    keep.setdefault(name, {})[dim] = np.searchsorted(kept_before, kept).tolist()
        if not keep:
            return self
        return replace(plan, keep=keep, fingerprint=shapes, cuts=self.cuts[len(before.cuts) :])

    def then(self, second: Plan) -> Plan:
        """Joins this plan and ``second``, which was made for the model that this one leaves, into one
        plan.

        Raises:
            PruneError: ``second`` was made for other shapes.
        """
        first, second = self.with_aliases(second.aliases), second.with_aliases(self.aliases)
        left, wanted = first.shapes_left(), second.fingerprint
        for name in [*left, *wanted]:
            if left.get(name) != wanted.get(name):
                raise PruneError(
                    f'the second plan was made for {name} of shape {shape_text(wanted.get(name))}, the '
                    f'first leaves {shape_text(left.get(name))}: they do not follow each other'
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
            cuts=self.cuts + second.cuts,
            budget=second.budget or self.budget,
            aliases=first.aliases | second.aliases,
        )

    def with_aliases(self, aliases: dict[str, str]) -> Plan:
        """Returns the same plan with entries under further names of its tensors.

        Args:
            aliases: {further name of a tensor: its first name}. Unknown tensors are ignored.
        """
        if aliases.items() <= self.aliases.items():
            return self
        shapes, keep, known_aliases = dict(self.fingerprint), dict(self.keep), {}
        for first_name, names in names_by_first(self.aliases | aliases).items():
            known_name = next(
                (name for table in (keep, shapes) for name in names if name in table), None
            )
            if known_name is None:
                continue
            for name in names:
                shapes.setdefault(name, shapes[known_name])
                if known_name in keep:
                    keep.setdefault(name, keep[known_name])
                if name != first_name:
                    known_aliases[name] = first_name
        return replace(self, keep=keep, fingerprint=shapes, aliases=known_aliases)

    def shapes_left(self) -> Fingerprint:
        """Returns {tensor name: shape} after the cuts."""
        left = {name: list(shape) for name, shape in self.fingerprint.items()}
        for name, dims in self.keep.items():
            for dim, kept in dims.items():
                left[name][dim] = len(kept)
        return left

    def module_names(self, name: str) -> list[str]:
        """Lists other names of the module ``name``, which follow from the aliases of its tensors.

        For example, the alias ``after.lent.0.weight`` of ``head.0.weight`` makes ``after.lent`` another
        name of ``head``, and ``after.lent.0`` one of ``head.0``.
        """
        others = []
        for pair in self.aliases.items():
            further, first = (tensor.split('.') for tensor in pair)
            while further and first and further.pop() == first.pop():
                modules = '.'.join(further), '.'.join(first)
                others += [b for a, b in (modules, modules[::-1]) if a == name]
        return others

    def removed(self, name: str, dim: int) -> list[int]:
        """Lists the original indices that are removed from dimension ``dim`` of the tensor ``name``."""
        is_removed = np.ones(self.fingerprint[name][dim], dtype=bool)
        is_removed[self.keep[name][dim]] = False
        return np.flatnonzero(is_removed).tolist()

    def to_meta(self) -> dict[str, Any]:
        """Returns the plan as plain ints, strings, lists and dicts, for a checkpoint's
        ``meta['mmprune']``."""
        meta = {
            'format': FORMAT,
            'mmprune': __version__,
            'fingerprint': {name: list(shape) for name, shape in self.fingerprint.items()},
            'keep': _copied(self.keep),
            'attributes': {name: dict(values) for name, values in self.attributes.items()},
            'history': self.history,
            'budget': dict(self.budget),
        }
        if self.aliases:
            meta['aliases'] = dict(self.aliases)
        return meta | {'checksum': checksum(meta)}

    @classmethod
    def from_meta(cls, meta: Any) -> Plan:
        """Reads what :meth:`to_meta` wrote, and checks every part of it.

        Raises:
            PruneError: the record is corrupt, of a later format, or no plan; it names the part.
        """
        check_meta(meta)
        return cls(
            keep=_copied(meta['keep']),
            attributes={name: dict(values) for name, values in meta['attributes'].items()},
            fingerprint={name: list(shape) for name, shape in meta['fingerprint'].items()},
            cuts=[CutRecord.from_meta(entry) for entry in meta['history']],
            budget=dict(meta['budget']),
            aliases=dict(meta.get('aliases', {})),
        )


def _copied(keep: Keep) -> Keep:
    return {name: {dim: list(kept) for dim, kept in dims.items()} for name, dims in keep.items()}


def plan_of(model: nn.Module) -> Plan | None:
    """Returns the plan by which ``model`` was cut, from its original.

    Args:
        model: any model, or a wrapper around it (``torch.compile``, ``DataParallel``). A part of a
            pruned model has the corresponding part of the plan.

    Returns:
        All cuts of the model as one plan; ``None`` if it was not cut.

    Example:
        >>> from torch import nn
        >>> mmprune.plan_of(nn.Conv2d(3, 8, 3)) is None
        True
    """
    plan = stored_plan(model)
    return None if plan is None else plan.with_aliases(aliases_of(innermost(model)))
