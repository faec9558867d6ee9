"""How a model of OpenMMLab is run on a batch, for tests that trace it by hand."""

from mmprune.mm.model_modes import first_trace, runs_of


def forwards_of(model, batch, count=4):
    """(the run whose FLOPs count, further runs whose ties count) for one batch of training data."""
    first, *others = first_trace(model, runs_of(model, batch, count=count))[1].ordered
    return first, tuple(others)
