"""Optional steps of a training, such as reports: a failure is logged once and does not end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

_reported: WeakKeyDictionary[logging.Logger, set[str]] = WeakKeyDictionary()
"""{logger of a run: the failures that it has reported as warnings}."""


@contextmanager
def optional(logger: logging.Logger, what: str, remedy: str = '') -> Iterator[None]:
    """Catches an exception inside the block, and logs it, so that the training continues.

    The first failure of ``what`` is logged as a warning with the exception's text. Its traceback, and
    every later failure of the same step, are logged at level DEBUG.

    Args:
        logger: the logger of the run.
        what: the failure as a sentence without its full stop, such as ``'The report page could not be
            made'``. It identifies the step.
        remedy: a sentence about what the user can do; empty if nothing can be done.
    """
    try:
        yield
    except Exception as error:
        reported = _reported.setdefault(logger, set())
        text = f'{what}: {type(error).__name__}: {error}. The training goes on without it. {remedy}'
        logger.log(logging.DEBUG if what in reported else logging.WARNING, text.strip())
        logger.debug('The failure happened here:', exc_info=True)
        reported.add(what)
