"""What a traced run costs, what it touched, and what it does not know."""

from dataclasses import dataclass, field

from mmprune.graph.module_numbers import ModuleCall
from mmprune.graph.slots import Ids


@dataclass(frozen=True)
class CostTerm:
    """``count`` of something in one call, in proportion to the kept part of each of ``axes``.
    ``where``: the module's name."""

    where: str
    count: float
    axes: list[Ids]


@dataclass
class Profile:
    """``multiply_adds``: of each contraction; ``activations``: elements of new memory; ``touched``: the
    parameters and buffers that took part; ``unknown_ops``: {operation without a rule: modules that it
    happened in}; ``calls``: of modules that keep numbers. Costs are those of the run during which
    ``counting`` was on."""

    multiply_adds: list[CostTerm] = field(default_factory=list)
    activations: list[CostTerm] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    unknown_ops: dict[str, list[str]] = field(default_factory=dict)
    calls: list[ModuleCall] = field(default_factory=list)
    counting: bool = True

    def add_multiply_adds(self, where: str, count: float, axes: list[Ids]) -> None:
        if self.counting:
            self.multiply_adds.append(CostTerm(where, float(count), axes))

    def add_unknown(self, op: str, where: str) -> None:
        found = self.unknown_ops.setdefault(op, [])
        if where not in found:
            found.append(where)
