"""The table of rules: what each operation ties together and what its output carries.

An operation is in one of four states: it has a rule here; it is elementwise by torch's own tag
(:data:`torch.Tag.pointwise`); it makes no labelled output from no labelled input, and is ignored; or
it is unknown, and locks every channel that goes in, under its name.
"""

from mmprune.graph.registry import RULES, Call, rule
from mmprune.graph.rules import contract, index, norm, pointwise, reduce, shape, spatial  # noqa: F401

__all__ = ['RULES', 'Call', 'rule']
