"""What the core logs goes to the log of the run of mmengine that is under way."""

import logging

from mmengine.logging import print_log


class _CurrentLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), 'current', record.levelno)


core = logging.getLogger('mmprune')
if not any(isinstance(handler, _CurrentLog) for handler in core.handlers):
    core.addHandler(_CurrentLog())
    core.setLevel(logging.INFO)
