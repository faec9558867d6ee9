"""Two runs that take turns, so that what they compute can be compared piece by piece and dropped."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from mmprune.contexts import random_state, set_random_state

AHEAD = 16 * 2**20
"""Bytes of small tensors that may pile up before the other run gets its turn: turns cost time too."""


class Abandoned(BaseException):
    """Ends the run ahead when nobody will look at the rest of it."""


class RunAhead:
    """A function in a thread of its own that stops where it has shown enough tensors.

    Only one of the two threads runs at any moment, and each has its own random state, so both draw what
    they would have drawn alone. Modes of torch (no_grad, dispatch modes) belong to a thread; gradients
    are off in this one, and autocast and the device are the caller's.

    Args:
        function: called with ``show(key, tensor)``, which may wait until :meth:`advance` is called
            again. A tensor is shown as it is at that moment, whatever is written into it later.
    """

    def __init__(self, function: Callable[[Callable[[Any, torch.Tensor], None]], Any]) -> None:
        self._function = function
        self._turn = threading.Condition()
        self._runs = self._abandoned = False
        self._randomness = random_state()
        self._devices = [(kind, *_autocast(kind)) for kind in ('cpu', 'cuda')]
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._error: BaseException | None = None
        self.shown: deque[tuple[Any, torch.Tensor]] = deque()
        self._held = 0
        self.result: Any = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> None:
        """Goes on until more is in ``shown``, or to ``ended`` and ``result``. Raises what the function
        raised."""
        if self.ended:
            return
        mine = random_state()
        set_random_state(self._randomness)
        self._held = 0
        with self._turn:
            self._runs = True
            if not self.thread.is_alive():
                self.thread.start()
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._runs)
        self._randomness = random_state()
        set_random_state(mine)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends the thread, wherever it is."""
        if self.thread.is_alive():
            with self._turn:
                self._abandoned = self._runs = True
                self._turn.notify_all()
            self.thread.join()

    def show(self, key: Any, tensor: torch.Tensor) -> None:
        """Called by the function only; elsewhere (the other run entered this one's model) it does
        nothing."""
        if threading.current_thread() is not self.thread:
            return
        self._held += tensor.numel() * tensor.element_size()
        if self._held < AHEAD:
            self.shown.append((key, tensor.clone()))
            return
        self.shown.append((key, tensor))  # nothing is written into it before it was looked at
        with self._turn:
            self._runs = False
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._runs)
        if self._abandoned:
            raise Abandoned

    def _run(self) -> None:
        try:
            if self._cuda is not None:
                torch.cuda.set_device(self._cuda)
            for kind, enabled, dtype in self._devices:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            with torch.no_grad():
                self.result = self._function(self.show)
        except Abandoned:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            with self._turn:
                self.ended, self._runs = True, False
                self._turn.notify_all()


def _autocast(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
