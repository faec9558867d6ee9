"""The record of each cut, which a plan carries along."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CutNotes:
    """Notes on the choice of the units, for the record of a cut.

    Args:
        iteration: training steps before the cut; ``None`` outside a training.
        latency: measured time of the pruned model as a fraction of the original's; ``None`` if the
            budget has no latency.
        uneven: one sentence for each layer whose width could not be rounded.
    """

    iteration: int | None = None
    latency: float | None = None
    uneven: tuple[str, ...] = ()

    # These two methods let `{'iteration': 3, **notes}` unpack the fields that are set.
    def keys(self) -> list[str]:
        """Lists the fields that are set."""
        return [name for name in _NAMES_OF_NOTES if getattr(self, name) not in (None, ())]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass(frozen=True, kw_only=True)
class CutRecord(CutNotes):
    """One cut in the history of a plan.

    Args:
        units_removed: number of units that the cut removed; ``None`` if the file does not say.
        flops_before: multiply-adds of one forward of the original.
        flops: multiply-adds of one forward after this cut.
        params_before: number of parameters of the original.
        params: number of parameters after this cut.
        more: entries that a later version of mmprune wrote. They are kept and written again.
    """

    units_removed: int | None = None
    flops_before: int
    flops: int
    params_before: int
    params: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_meta(self) -> dict[str, Any]:
        """Returns the record as plain data for a checkpoint of format 1, without fields that are not
        set."""
        values = {name: getattr(self, name) for name in _NAMES_OF_RECORD}
        values['uneven'] = list(self.uneven)
        return {
            key: value for key, value in values.items() if value is not None and value != []
        } | dict(self.more)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> 'CutRecord':
        """Reads what :meth:`to_meta` wrote. :meth:`mmprune.Plan.from_meta` has checked the types."""
        values = {name: meta[name] for name in _NAMES_OF_RECORD if name in meta}
        if 'uneven' in values:
            values['uneven'] = tuple(values['uneven'])
        return cls(
            **values, more={key: value for key, value in meta.items() if key not in _NAMES_OF_RECORD}
        )


_NAMES_OF_NOTES = tuple(field.name for field in fields(CutNotes))
_NAMES_OF_RECORD = tuple(field.name for field in fields(CutRecord) if field.name != 'more')
