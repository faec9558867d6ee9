"""The budget of a cut: how much of the model has to remain, and in which parts."""

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from mmprune.budget.runtimes import check_backend
from mmprune.errors import PruneError, did_you_mean

FRACTIONS = ('keep_flops', 'keep_params', 'keep_channels', 'latency')
"""The targets that are fractions of the unpruned model."""

TARGETS = (*FRACTIONS, 'prune_num')
"""The options that say when to stop; all others say what may be removed."""

PART_OPTIONS = ('keep_flops', 'keep_params', 'keep_channels', 'prune_num', 'min_channels', 'divisor')
"""The options that a part of the model may have."""

REMOVED_DEFAULTS = {'max_cut': 1.0}
"""Options that earlier versions wrote into plans. At these values they changed nothing, so they are
ignored; at any other value they are an error."""

Divisor = int | Literal['auto']
"""The type of the option ``divisor``."""


@dataclass(frozen=True)
class Budget:
    """How much of the model has to remain, and in which parts. Of several targets, the one that is
    reached first ends the cut.

    Args:
        keep_flops: the fraction of the unpruned model's multiply-adds that remains, in (0, 1].
        keep_params: the fraction of the unpruned model's parameters that remains, in (0, 1].
        keep_channels: the fraction of units that every group keeps, in (0, 1].
        latency: the fraction of the unpruned model's measured time that remains, in (0, 1].
        backend: the runtime in which times are measured: ``'eager'`` (torch), ``'onnxruntime'`` or
            ``'openvino'``. The multiple for ``divisor='auto'`` is measured in the same runtime.
        prune_num: the number of units that one cut removes.
        min_channels: the number of channels that every group keeps at least.
        divisor: widths are multiples of this number. ``'auto'`` takes the channel multiple that was
            measured to be fast on this device (``mmprune/budget/device.py``). One step then removes at
            most a quarter of a layer, and widths are multiples of 4 wherever they are above 4.
        lock: patterns of tensor names (``'backbone.layer1.*'``) whose units are never removed.
        parts: {part: {option: value}}, options for the units that are made in one part of the model. A
            part is given by the start of its names (``backbone``, ``roi_head.bbox_head``) or by a
            pattern (``*.layer3.*``). A part with a target (``dict(neck=dict(keep_flops=0.6))``) is cut
            to that target and does not count for the model's. Without a target, the part only changes
            ``min_channels`` or ``divisor``. If only parts have targets, the rest of the model is not
            cut. A unit that is in several parts belongs to the first of them.

    Raises:
        PruneError: there is no target, or a value is out of its range.

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
    lock: tuple[str, ...] = field(default=())
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in FRACTIONS:
            _check_fraction(name, getattr(self, name))
        for name in ('prune_num', 'min_channels', 'divisor'):
            _check_count(name, getattr(self, name))
        check_backend(self.backend)
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
        """The targets that were given for the whole model, without the targets of parts."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}

    def locks(self, name: str) -> bool:
        """Whether a pattern of ``lock`` matches the name of a tensor."""
        return any(fnmatchcase(name, pattern) for pattern in self.lock)

    def of_part(self, name: str) -> 'Limits':
        """Returns the options of one part. Limits that the part does not set are the model's."""
        options = self.parts[name]
        return Limits(
            options.get('min_channels', self.min_channels),
            options.get('divisor', self.divisor),
            {target: options[target] for target in TARGETS if target in options},
        )

    @property
    def whole(self) -> 'Limits':
        """The options for the units that belong to no part."""
        return Limits(self.min_channels, self.divisor, self.targets)

    def scheduled(self, along: Callable[[str, float], float]) -> 'Budget':
        """Returns the budget of one of several cuts.

        Args:
            along: called as ``along(name, fraction)`` with each target that is a fraction, also those
                of parts. It returns the fraction that replaces the target.
        """

        def with_new_fractions(options: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: along(name, value) if name in FRACTIONS else value
                for name, value in options.items()
            }

        return replace(
            self,
            **with_new_fractions(self.targets),
            parts={part: with_new_fractions(options) for part, options in self.parts.items()},
        )

    def to_meta(self) -> dict[str, Any]:
        """Converts the budget to plain numbers, strings, lists and dicts, without options that are
        ``None`` and without ``parts`` and ``backend`` that have their default values."""
        meta = {f.name: getattr(self, f.name) for f in fields(self)}
        meta |= {'lock': list(self.lock), 'parts': {k: dict(v) for k, v in self.parts.items()}}
        defaults = {'parts': {}, 'backend': 'eager'}
        return {k: v for k, v in meta.items() if v is not None and v != defaults.get(k)}


@dataclass(frozen=True)
class Limits:
    """The options of a :class:`Budget` that hold for the units of one part."""

    min_channels: int
    divisor: Divisor
    targets: Mapping[str, float]


def _check_fraction(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        raise PruneError(f'{name}={value!r} is a string: give {_unquoted(name, value, 0.5)}')
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
        raise PruneError(
            f'{name}={value!r} is outside (0, 1]: it is the fraction that remains; give e.g. 0.5'
        )


def _check_count(name: str, value: Any) -> None:
    if (name, value) in (('prune_num', None), ('divisor', 'auto')):
        return
    if isinstance(value, str):
        raise PruneError(f'{name}={value!r} is a string: give {_unquoted(name, value, 8)}')
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        or_auto = " or 'auto'" if name == 'divisor' else ''
        raise PruneError(f'{name}={value!r}: must be an integer >= 1{or_auto}')


def _unquoted(name: str, value: str, example: float) -> str:
    """Says what to write instead of a string: the number that it holds, or else an example."""
    try:
        float(value)
    except ValueError:
        return f'a number, e.g. {name}={example}' + (" or 'auto'" if name == 'divisor' else '')
    return f'the number itself, {name}={value.strip()}'


def _checked_parts(parts: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(parts, Mapping):
        raise PruneError(f'parts={parts!r}: give a dict such as dict(neck=dict(keep_flops=0.5))')
    checked = {}
    for part, options in parts.items():
        if not isinstance(part, str) or not isinstance(options, Mapping) or not options:
            raise PruneError(
                f'parts[{part!r}]={options!r}: give a dict of options such as dict(keep_flops=0.5)'
            )
        options = without_removed(options)
        unknown = next((name for name in options if name not in PART_OPTIONS), None)
        if unknown is not None:
            raise PruneError(
                f'parts[{part!r}]: unknown option {unknown!r}: {did_you_mean(unknown, PART_OPTIONS)}'
            )
        # A Budget checks the values. It needs a target, and a part may have none.
        with_target: dict[str, Any] = {'prune_num': 1, **options}
        try:
            Budget(**with_target)
        except PruneError as error:
            raise PruneError(f'parts[{part!r}]: {error}') from error
        if options:
            checked[part] = options
    return checked


def without_removed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``options`` without those of earlier versions whose value changed nothing."""
    return {
        name: value
        for name, value in options.items()
        if name not in REMOVED_DEFAULTS or value != REMOVED_DEFAULTS[name]
    }


def make_budget(
    budget: Budget | Mapping[str, Any] | None = None,
    others: Iterable[str] = (),
    /,
    **options: Any,
) -> Budget:
    """Makes a Budget from ``budget`` or from ``options``.

    Args:
        budget: a :class:`Budget`, a mapping of its options, or ``None`` if ``options`` are given.
        others: names of the caller's own options, for "did you mean": a misspelt ``optimizer=`` of
            :func:`mmprune.prune` arrives among the options of the budget.
        options: the options of :class:`Budget` as keywords.

    Raises:
        PruneError: ``budget`` and ``options`` were both given; an option is unknown (the message names
            the most similar one and lists all) or was removed; a value is out of its range; a target is
            1.0, which removes nothing.
    """
    given_as_keywords = budget is None
    if budget is None:
        budget = options
    elif options:
        raise PruneError(
            f'budget= and {", ".join(f"{name}=" for name in options)} were both given: put all options '
            'of the budget into one of the two'
        )
    if not isinstance(budget, Budget | Mapping):
        raise PruneError(
            f'budget={budget!r} is not a Budget: give mmprune.Budget(keep_flops=0.5) or a dict such '
            'as dict(keep_flops=0.5)'
        )
    if isinstance(budget, Mapping):
        budget = without_removed(budget)
        option_names = [f.name for f in fields(Budget)]
        unknown = next((name for name in budget if name not in option_names), None)
        if unknown is not None:
            candidates = (
                list(dict.fromkeys([*option_names, *others])) if given_as_keywords else option_names
            )
            raise PruneError(f'unknown budget option {unknown!r}: {did_you_mean(unknown, candidates)}')
        budget = Budget(**budget)
    # A part may have a target of 1.0: it keeps the part as it is while the rest is cut.
    for name, value in budget.targets.items():
        if name in FRACTIONS and value == 1:
            raise PruneError(
                f'{name}={value!r} removes nothing: it is the fraction that remains; give e.g. 0.5'
            )
    return budget


def own_options(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the parameters of a function or class that have a default value."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is not parameter.empty]
