"""The exception of the package, and the one kind of it that the package itself acts on."""


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
