"""The result of traced runs: constraints on channels, and a profile of the runs."""

from dataclasses import dataclass, field

from mmprune.contexts import Forward
from mmprune.graph.constraints import Constraints
from mmprune.graph.module_numbers import ModuleCall
from mmprune.graph.slots import Ids


@dataclass(frozen=True)
class CostTerm:
    """An amount that one call of one operation accounts for, e.g. its multiply-adds.

    Args:
        where: the name of the module that ran.
        count: the amount in the unpruned call.
        axes: slot ids, one array for each dimension that the amount is proportional to. If half of the
            channels of two axes remain, a quarter of the amount remains.
    """

    where: str
    count: float
    axes: list[Ids]


@dataclass
class Profile:
    """What traced runs cost, which tensors took part in them, and which operations have no rule.

    Args:
        multiply_adds: one term for each contraction.
        activations: the number of elements of each tensor that took new memory (no views, nothing that
            was written in place).
        touched: names of the parameters and buffers that took part.
        unknown_ops: {operation without a rule: names of the modules in which it ran}.
        calls: calls of modules that hold integers; :mod:`mmprune.graph.module_numbers` reads them.
        counting: whether costs are being recorded. Only one run is counted.
    """

    multiply_adds: list[CostTerm] = field(default_factory=list)
    activations: list[CostTerm] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    unknown_ops: dict[str, list[str]] = field(default_factory=dict)
    calls: list[ModuleCall] = field(default_factory=list)
    counting: bool = True

    def add_multiply_adds(self, where: str, count: float, axes: list[Ids]) -> None:
        """Adds a term, unless costs are not being recorded."""
        if self.counting:
            self.multiply_adds.append(CostTerm(where, float(count), axes))

    def add_unknown(self, op: str, where: str) -> None:
        """Records that an operation without a rule ran in the module ``where``."""
        modules = self.unknown_ops.setdefault(op, [])
        if where not in modules:
            modules.append(where)


@dataclass
class TraceRecord:
    """The input of :func:`mmprune.graph.coupling.couple`.

    Args:
        constraints: ties, locks and conditions of all runs.
        profile: costs of the first run, and what took part in any run.
        failed: {run that was allowed to fail and did: its error}.
        both_modes: whether the first run was traced in training mode and in evaluation mode.
    """

    constraints: Constraints
    profile: Profile
    failed: dict[Forward, Exception] = field(default_factory=dict)
    both_modes: bool = False
