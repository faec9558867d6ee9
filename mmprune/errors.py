"""The exception of the package, the kind of it that the package itself acts on, and "did you mean"."""

from collections.abc import Iterable
from difflib import get_close_matches


class PruneError(Exception):
    """Something about the model, the budget, the checkpoint or the call rules the pruning out.

    Raised before anything is written or cut, so what was passed in is as it was. The message is for
    the person who made the call and can be read without the traceback. It gives, as far as they
    apply, in this order:

    - the *name* of the thing: the tensor, module, option or file;
    - its *shape or value*, next to what was expected;
    - the *remedy*: what to change so that it works.

    Where many things mismatch, the message lists all of them (or the first few and their number) at
    once, rather than one for each try. For example::

        keep_flops=1.3 is outside (0, 1]: it is the fraction of FLOPs that remains, e.g. 0.5
    """


class InexactCut(PruneError):
    """A cut that was tried on a copy does not compute what the masked original does, or can't run.

    Leaving out the groups of channels that are to blame makes it exact; other errors stay whatever is
    cut.
    """


REMOVED_OPTIONS: dict[str, str] = {
    'frozen': 'units that a frozen weight reads stay; to prune them, train that weight',
    'max_cut': 'make more cuts (steps of PruneHook), which limits what each of them removes',
    'momentum': 'scores are the mean over the iterations since the last cut; leave it out',
    'normalize': "a criterion declares it: mmprune.criterion(name, normalize='group')",
    'penalty': "scores are divided by what a unit costs: Score(name, per='flops')",
    'predictions': 'distillation compares features alone; leave it out',
    'schedule': 'targets fall linearly from cut to cut; leave it out',
    'temperature': 'distillation compares features alone; leave it out',
    'rebuild_only': "give dict(type='RebuildHook') in place of this PruneHook",
    'recalibrate': 'call mmprune.recalibrate(model, forward, batches) after the cut',
    'schedule': 'targets fall linearly from cut to cut; leave it out',
}
"""{option of an earlier version: what to do in its place, as a clause}."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ends an error message about an unknown option: the replacement of an option that was removed, or
    the most similar known name and the list of all.

    Args:
        name: the option that somebody wrote.
        known: the options that exist.

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
