"""What users ask for: how much is to remain, and where."""

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from mmprune.budget.runtimes import check_backend
from mmprune.errors import PruneError, did_you_mean

FRACTIONS = ('keep_flops', 'keep_params', 'keep_channels', 'latency')
TARGETS = (*FRACTIONS, 'prune_num')
"""The options that say when to stop; the others say what may go."""

PART_OPTIONS = (
    'keep_flops', 'keep_params', 'keep_channels', 'prune_num', 'min_channels', 'divisor', 'max_cut',
)  # fmt: skip


Divisor = int | Literal['auto']


@dataclass(frozen=True)
class Budget:
    """How much is to remain, and where. Of several targets the first that is reached counts.

    Args:
        keep_flops: the fraction, in (0, 1], that remains of the unpruned model's multiply-adds.
        keep_params: the same of its parameters.
        keep_channels: the fraction of its units that every group keeps.
        latency: the fraction that remains of its measured time.
        backend: what times are measured in, those that ``divisor='auto'`` rests on too: ``'eager'``,
            or the runtime that the model is deployed on, ``'onnxruntime'`` or ``'openvino'``.
        prune_num: how many units go in one cut.
        min_channels: channels that every group keeps at least.
        divisor: units go in blocks that leave widths that are multiples of it; ``'auto'``: of what
            this device works in, as measured (``mmprune/budget/device.py``), but no more than a
            quarter of a layer at once, and of 4 at least, but for widths below that.
        max_cut: the largest fraction of a group, in (0, 1], that one cut removes.
        lock: patterns of tensor names (``'backbone.layer1.*'``) whose units stay.
        parts: {name: options} for the units that are made in a part of the model, given by the start
            of its names (``backbone``, ``roi_head.bbox_head``) or a pattern (``*.layer3.*``). A part
            with a target of its own (``dict(neck=dict(keep_flops=0.6))``) is cut to that, and by no
            other; one without sets ``min_channels``, ``divisor`` or ``max_cut`` there. Targets in
            ``parts`` alone leave the rest of the model as it is. A unit in several parts belongs to
            the first.

    Raises:
        PruneError: no target, or a value that is out of its range.

    Example:
        >>> budget = mmprune.Budget(keep_flops=0.5, lock='head.*')
        >>> budget.targets
        {'keep_flops': 0.5}
        >>> mmprune.Budget(prune_num=0)
        Traceback (most recent call last):
        mmprune.errors.PruneError: prune_num=0: must be an integer >= 1
    """

    keep_flops: float | None = None
    keep_params: float | None = None
    keep_channels: float | None = None
    latency: float | None = None
    backend: str = 'eager'
    prune_num: int | None = None
    min_channels: int = 1
    divisor: Divisor = 'auto'
    max_cut: float = 1.0
    lock: tuple[str, ...] = field(default=())
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*FRACTIONS, 'max_cut', 'prune_num', 'min_channels', 'divisor'):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ('divisor', 'auto'):
                raise PruneError(f'{name}={value!r} is a string: give {_unquoted(name, value)}')
        for name in (*FRACTIONS, 'max_cut'):
            value = getattr(self, name)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < float(value) <= 1):
                raise PruneError(
                    f'{name}={value!r} is outside (0, 1]: it is '
                    + (
                        'the largest fraction of a group that one cut removes'
                        if name == 'max_cut'
                        else 'the fraction that remains; give e.g. 0.5'
                    )
                )
        check_backend(self.backend)
        for name in ('prune_num', 'min_channels', 'divisor'):
            value = getattr(self, name)
            if (name, value) in (('prune_num', None), ('divisor', 'auto')):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PruneError(
                    f'{name}={value!r}: must be an integer >= 1'
                    + (" or 'auto'" if name == 'divisor' else '')
                )
        lock = (self.lock,) if isinstance(self.lock, str) else tuple(self.lock)
        for pattern in lock:
            if not isinstance(pattern, str):
                raise PruneError(f'lock={pattern!r}: give patterns of tensor names, e.g. "backbone.*"')
        object.__setattr__(self, 'lock', lock)
        object.__setattr__(self, 'parts', _checked_parts(self.parts))
        if not self.targets and not any(self.of_part(part).targets for part in self.parts):
            raise PruneError(f'no budget: give one or more of {", ".join(TARGETS)}')

    @property
    def targets(self) -> dict[str, float]:
        """The targets that were given, those of parts aside."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}

    def locks(self, name: str) -> bool:
        """Whether a pattern of ``lock`` names this tensor."""
        return any(fnmatchcase(name, pattern) for pattern in self.lock)

    def of_part(self, name: str) -> 'Limits':
        """The options of one part, the whole model's where it has none."""
        own = dict(self.parts[name])
        limits = {key: own.get(key, getattr(self, key)) for key in Limits.NAMES}
        return Limits(**limits, targets={key: own[key] for key in TARGETS if key in own})

    @property
    def whole(self) -> 'Limits':
        return Limits(self.min_channels, self.divisor, self.max_cut, self.targets)

    def scheduled(self, along: Callable[[str, float], float]) -> 'Budget':
        """This budget with ``along(name, fraction)`` in place of every fraction that remains, those
        of parts included: what one of several cuts aims at."""
        changed = {
            name: along(name, value) for name, value in self.targets.items() if name in FRACTIONS
        }
        parts = {
            part: {
                key: along(key, value) if key in FRACTIONS else value for key, value in options.items()
            }
            for part, options in self.parts.items()
        }
        return replace(self, **changed, parts=parts)

    def to_meta(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; what was left out is left out."""
        meta = {f.name: getattr(self, f.name) for f in fields(self)}
        meta |= {'lock': list(self.lock), 'parts': {k: dict(v) for k, v in self.parts.items()}}
        usual = {'parts': {}, 'backend': 'eager'}
        return {k: v for k, v in meta.items() if v is not None and v != usual.get(k)}


@dataclass(frozen=True)
class Limits:
    """What holds for the units of one part: see :class:`Budget`."""

    min_channels: int
    divisor: Divisor
    max_cut: float
    targets: Mapping[str, float]

    NAMES = ('min_channels', 'divisor', 'max_cut')


def _unquoted(name: str, value: str) -> str:
    """What to write in place of a string: its number without quotes, if it holds one."""
    try:
        float(value)
    except ValueError:
        example = 0.5 if name in (*FRACTIONS, 'max_cut') else 8
        return f'a number, e.g. {name}={example}' + (" or 'auto'" if name == 'divisor' else '')
    return f'the number itself, {name}={value.strip()}'


def _checked_parts(parts: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(parts, Mapping):
        raise PruneError(f'parts={parts!r}: give a dict such as dict(neck=dict(keep_flops=0.5))')
    found = {}
    for name, options in parts.items():
        if not isinstance(name, str) or not isinstance(options, Mapping) or not options:
            raise PruneError(
                f'parts[{name!r}]={options!r}: give a dict of options such as dict(keep_flops=0.5)'
            )
        unknown = [key for key in options if key not in PART_OPTIONS]
        if unknown:
            raise PruneError(
                f'parts[{name!r}]: unknown option {unknown[0]!r}: '
                f'{did_you_mean(unknown[0], PART_OPTIONS)}'
            )
        checked: dict[str, Any] = {'prune_num': 1, **options}
        try:
            Budget(**checked)
        except PruneError as error:
            raise PruneError(f'parts[{name!r}]: {error}') from error
        found[name] = dict(options)
    return found


def make_budget(
    budget: Budget | Mapping[str, Any] | None = None,
    others: Iterable[str] = (),
    /,
    **options: Any,
) -> Budget:
    """A Budget from what a caller gave: one of these, not both.

    Args:
        budget: a :class:`Budget`, or a mapping of its options.
        others: names of the caller's own options, for "did you mean". A misspelt ``optimizer=`` of
            :func:`mmprune.prune` arrives here among the options of the budget.
        options: options of :class:`Budget`, as keywords.

    Raises:
        PruneError: ``budget`` beside options; an unknown option (the most similar one is named, and
            the known ones are listed); a bad value; a target of 1.0, which removes nothing.
    """
    as_options = budget is None
    if budget is None:
        budget = options
    elif options:
        raise PruneError(
            f'budget= and {", ".join(f"{name}=" for name in options)} were both given: put all options '
            'of the budget into one of the two'
        )
    if isinstance(budget, Budget):
        return _removing(budget)
    if not isinstance(budget, Mapping):
        raise PruneError(
            f'budget={budget!r} is not a Budget: give mmprune.Budget(keep_flops=0.5) or a dict such '
            'as dict(keep_flops=0.5)'
        )
    known = [f.name for f in fields(Budget)]
    unknown = [name for name in budget if name not in known]
    if unknown:
        names = list(dict.fromkeys([*known, *others])) if as_options else known
        raise PruneError(f'unknown budget option {unknown[0]!r}: {did_you_mean(unknown[0], names)}')
    return _removing(Budget(**budget))


def own_options(function: Callable[..., Any]) -> list[str]:
    """Names of a function's or class's own keywords, beside the ``**options`` of a budget."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]


def _removing(budget: Budget) -> Budget:
    """``budget``, unless a target of 1.0 says that nothing is removed. (A part may have such a target:
    it keeps the part as it is, while the rest is cut.)"""
    for name, value in budget.targets.items():
        if name in FRACTIONS and value == 1:
            raise PruneError(
                f'{name}={value!r} removes nothing: it is the fraction that remains; give e.g. 0.5'
            )
    return budget
