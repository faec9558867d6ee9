"""The exceptions of the package, and the hint that an error message gives about an unknown option."""

from collections.abc import Iterable
from difflib import get_close_matches


class PruneError(Exception):
    """Pruning is not possible with this model, budget, checkpoint or call.

    It is raised before anything is written or cut, so the arguments are unchanged. The message is meant
    for the person who made the call, and can be read without the traceback. It gives, if they apply and
    in this order:

    - the *name* of the tensor, module, option or file;
    - its *shape or value*, next to what was expected;
    - the *remedy*: what to change.

    If several things are wrong, the message lists all of them, or the first few and their number. For
    example::

        keep_flops=1.3 is outside (0, 1]: it is the fraction of FLOPs that remains, e.g. 0.5
    """


class InexactCut(PruneError):
    """A cut of a copy of the model does not compute what the masked original computes, or does not run.

    The caller may lock the groups of channels that cause it and try again. No other error depends on
    which channels are cut.
    """


REMOVED_OPTIONS: dict[str, str] = {
    'frozen': 'units that a frozen weight reads stay; to prune them, train that weight',
    'max_cut': 'make more cuts (steps of PruneHook), which limits what each of them removes',
    'momentum': 'scores are the mean over the iterations since the last cut; leave it out',
    'normalize': "a criterion declares it: mmprune.criterion(name, normalize='group')",
    'penalty': "scores are divided by what a unit costs: Score(name, per='flops')",
    'predictions': 'distillation compares features alone; leave it out',
    'temperature': 'distillation compares features alone; leave it out',
    'rebuild_only': "give dict(type='RebuildHook') in place of this PruneHook",
    'recalibrate': 'call mmprune.recalibrate(model, forward, batches) after the cut',
    'schedule': 'targets fall linearly from cut to cut; leave it out',
}
"""{option of an earlier version: what to do in its place, as a clause}."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ends an error message about an unknown option.

    Args:
        name: the option that the user wrote.
        known: the options that exist.

    Returns:
        The replacement of an option that was removed; otherwise the most similar known option, if there
        is one, and the list of all.

    Example:
        >>> did_you_mean('keep_flop', ['keep_flops', 'divisor'])
        'did you mean keep_flops? Expected one of keep_flops, divisor'
    """
    if name in REMOVED_OPTIONS:
        return f'{name} was removed: {REMOVED_OPTIONS[name]}'
    names = list(known)
    similar = get_close_matches(str(name), names, 1)
    expected = f'xpected one of {", ".join(names)}'
    return f'did you mean {similar[0]}? E{expected}' if similar else f'e{expected}'
