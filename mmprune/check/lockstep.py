"""Runs a function in a second thread, in turns with the caller, so that two runs can be compared.

The problem: comparing all outputs of two runs needs the outputs of one run in memory until the other
run has made the same ones. For a detector at full size that takes as much memory as a training step.

The idea: the two runs take turns. The first run stops whenever it has shown enough tensors, and waits.
The second run compares its outputs with the shown ones, drops them, and asks for more. Example::

    ahead = RunAhead(lambda show: [show(i, layer) for i, layer in enumerate(layers_of_the_original)])
    ahead.advance()   # the first run makes the first outputs: ahead.shown = deque([(0, tensor)])
    ...               # the caller compares them with its own, and clears ahead.shown
    ahead.advance()   # the first run goes on from where it stopped
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from mmprune import compat
from mmprune.contexts import random_state, set_random_state

AHEAD = 16 * 2**20
"""Bytes of shown tensors after which the run ahead stops. With fewer, more turns would cost time."""


class Abandoned(BaseException):
    """Ends the run ahead when nobody will look at the rest of it."""


class RunAhead:
    """A function in a second thread that stops when it has shown enough tensors.

    Only one of the two threads runs at any moment, and each has its own random state, so both draw the
    numbers that they would draw alone. Modes of torch (no_grad, dispatch modes) belong to a thread: the
    second thread runs without gradients, with the caller's autocast and GPU.

    Args:
        function: called with ``show(key, tensor)``, which may wait until :meth:`advance` is called
            again. A tensor is shown with its values at that moment, even if it is written to later.
    """

    def __init__(self, function: Callable[[Callable[[Any, torch.Tensor], None]], Any]) -> None:
        self._function = function
        self._turn = threading.Condition()
        self._runs = self._abandoned = False
        self._randomness = random_state()
        self._autocast = [(kind, *compat.autocast_state(kind)) for kind in ('cpu', 'cuda')]
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._error: BaseException | None = None
        self._held = 0  # bytes shown since the last turn
        self.shown: deque[tuple[Any, torch.Tensor]] = deque()
        self.result: Any = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> None:
        """Lets the function run until more is in ``shown``, or until it has ``ended`` with ``result``.
        Raises what the function raised."""
        if self.ended:
            return
        callers_randomness = random_state()
        set_random_state(self._randomness)
        self._held = 0
        with self._turn:
            self._runs = True
            if not self.thread.is_alive():
                self.thread.start()
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._runs)
        self._randomness = random_state()
        set_random_state(callers_randomness)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends the thread, wherever in the function it is."""
        if self.thread.is_alive():
            with self._turn:
                self._abandoned = self._runs = True
                self._turn.notify_all()
            self.thread.join()

    def show(self, key: Any, tensor: torch.Tensor) -> None:
        """Adds a tensor to ``shown``, and waits for the caller once :data:`AHEAD` bytes are shown.
        Calls from another thread are ignored: the other run has then entered this run's model."""
        if threading.current_thread() is not self.thread:
            return
        self._held += tensor.numel() * tensor.element_size()
        if self._held < AHEAD:
            self.shown.append((key, tensor.clone()))
            return
        self.shown.append((key, tensor))  # no copy: this thread waits until the caller has seen it
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
            for kind, enabled, dtype in self._autocast:
                compat.set_autocast_state(kind, enabled, dtype)
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
