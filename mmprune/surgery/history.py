"""What a cut did, and what a model was before its first: the facts that a plan carries along."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CutNotes:
    """What whoever chooses the units of a cut notes beside them.

    Args:
        iteration: training steps before the cut.
        latency: the fraction that remains of the original's time, as it was measured.
        uneven: a sentence for each layer whose width could not be rounded.
    """

    iteration: int | None = None
    latency: float | None = None
    uneven: tuple[str, ...] = ()

    # `{'iteration': 3, **notes}`: mm/hooks adds its iteration so.
    def keys(self) -> list[str]:
        return [each.name for each in fields(self) if getattr(self, each.name) not in (None, ())]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class CutRecord:
    """One cut, in the history of a plan.

    Args:
        iteration, latency, uneven: see :class:`CutNotes`.
        units_removed: how many units went.
        flops_before, flops: multiply-adds of one forward of the original, and of what this cut left.
        params_before, params: numbers of parameters, alike.
        more: what a later version noted beside these; it is written again as it was read.
    """

    iteration: int | None = None
    latency: float | None = None
    uneven: tuple[str, ...] = ()
    units_removed: int | None = None
    flops_before: int
    flops: int
    params_before: int
    params: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_meta(self) -> dict[str, Any]:
        """As a checkpoint of format 1 has it: plain data, without what was not noted."""
        known = {name: getattr(self, name) for name in _KNOWN}
        known['uneven'] = list(self.uneven)
        return {k: v for k, v in known.items() if v is not None and v != []} | dict(self.more)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> 'CutRecord':
        """What :meth:`to_meta` gave; :meth:`mmprune.Plan.from_meta` has checked it."""
        known = {name: meta[name] for name in _KNOWN if name in meta}
        if 'uneven' in known:
            known['uneven'] = tuple(known['uneven'])
        return cls(**known, more={k: v for k, v in meta.items() if k not in _KNOWN})


_KNOWN = tuple(each.name for each in fields(CutRecord) if each.name != 'more')
