"""The table of rules: what each operation ties together and what its output carries.

An operation is in one of four states: it has a rule here; it is elementwise by torch's own tag
(:data:`torch.Tag.pointwise`); it makes no labelled output from no labelled input, and is ignored; or
it is unknown, and locks every channel that goes in, under its name.
"""

import torch

from mmprune.graph.registry import RULES, Rule
from mmprune.graph.rules import contract, index, norm, pointwise, reduce, shape, spatial  # noqa: F401

ELEMENTWISE = Rule(pointwise.pointwise)


def rule_of(func: torch._ops.OpOverload, name: str) -> Rule | None:
    """The rule of an operation, or ``None`` where it is unknown."""
    found = RULES.get(name)
    if found is None and torch.Tag.pointwise in func.tags:
        return ELEMENTWISE
    return found
