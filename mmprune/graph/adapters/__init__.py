"""Structure adapters: the three things that the dispatcher can not see.

- *opaque operations*: compiled functions outside the dispatcher (mmcv's), by the name that
  ``mmcv::`` and the function make;
- *stale attributes*: channel counts that a module keeps as Python numbers and that must follow a cut;
- *hard-coded sizes*: code whose channel count can not change.

All three are functions of a :class:`~mmprune.graph.call.Call`, registered with one decorator,
:func:`adapter`. See ``docs/adapters.md``. None needs the library it is for: they name the classes that
they know by dotted paths.
"""

from mmprune.graph.adapters import mmcv, mmdet, torch_nn  # noqa: F401
from mmprune.graph.registry import adapter

__all__ = ['adapter']
