"""Structure adapters declare what the dispatcher cannot show.

- *Opaque operations*: compiled functions outside the dispatcher, such as mmcv's. Their names consist of
  the package and the function: ``mmcv::roi_align_forward``.
- *Stale attributes*: channel counts that a module keeps as Python numbers and that must follow a cut.
- *Hard-coded sizes*: code whose channel count cannot change.

All three are functions of a :class:`~mmprune.graph.call.Call` that one decorator registers,
:func:`adapter`. See ``docs/adapters.md``. No adapter imports the library that it is for: classes are
given by dotted names.
"""

from mmprune.graph.adapters import mmcv, mmdet, torch_nn  # noqa: F401
from mmprune.graph.registry import adapter

__all__ = ['adapter']
