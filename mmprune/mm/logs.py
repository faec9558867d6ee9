"""Sends the log of mmprune's core to the log of mmengine."""

import logging

from mmengine.logging import print_log


class _MmengineHandler(logging.Handler):
    """Writes each record to the logger of mmengine's current run."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), 'current', record.levelno)


def send_to_mmengine() -> None:
    """Sends records of the core's log with level INFO or above to mmengine. A second call changes
    nothing."""
    core = logging.getLogger('mmprune')
    if not any(isinstance(handler, _MmengineHandler) for handler in core.handlers):
        core.addHandler(_MmengineHandler())
        core.setLevel(logging.INFO)
