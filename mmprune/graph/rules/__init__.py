"""The table of rules: which channels each operation ties together, and what its output carries.

An operation is in one of four states:

- it has a rule in this package, or one that a user registered;
- torch tags it as elementwise (:data:`torch.Tag.pointwise`), which has one rule for all;
- no input carries channels, so it is ignored;
- it is unknown: every channel of its inputs is locked, and reports list the operation by name.
"""

import torch

from mmprune.graph.registry import RULES, Rule
from mmprune.graph.rules import contract, index, norm, pointwise, reduce, shape, spatial  # noqa: F401

ELEMENTWISE = Rule(pointwise.pointwise)
"""The rule of every operation that torch tags as elementwise."""


def rule_of(func: torch._ops.OpOverload, name: str) -> Rule | None:
    """Returns the rule of an operation, or ``None`` if it is unknown."""
    entry = RULES.get(name)
    if entry is None and torch.Tag.pointwise in func.tags:
        return ELEMENTWISE
    return entry
