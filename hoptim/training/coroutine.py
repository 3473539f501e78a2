"""A coroutine whose body is ordinary code: it can pause inside any function that it calls, since it has its own thread."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from queue import SimpleQueue
from typing import Any

import torch

from hoptim.problem.mixed_precision import DEVICES


class Coroutine:
    """A function that runs from one :meth:`pause` inside it to the next each time it is resumed.

    It runs in its own thread, while the caller of :meth:`resume` waits: no two of them run at the same time. What torch sets
    for each thread (the default device, CUDA's current device and autocast) is taken from the thread that makes the object.

    Args:
        function: what to run.

    >>> def count():
    ...     for number in range(2):
    ...         print("paused with", number, "resumed with", counting.pause(number))
    >>> counting = Coroutine(count)
    >>> [counting.resume(sent) for sent in ("nothing yet", "a")], counting.resume("b"), counting.is_done
    paused with 0 resumed with a
    paused with 1 resumed with b
    ([0, 1], None, True)
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.is_done = self._is_closing = False
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        settings, context = _settings_of_this_thread(), contextvars.copy_context()

        def body() -> None:
            error: BaseException | None = None
            try:
                self._inbox.get()
                self.check()
                with ExitStack() as stack:
                    for setting in settings:
                        stack.enter_context(setting)
                    function()
            except BaseException as caught:
                error = caught
            self.is_done = True
            self._outbox.put((None, error))

        self._thread = threading.Thread(target=context.run, args=(body,), name="hoptim: coroutine", daemon=True)

    def resume(self, sent: Any = None) -> Any:
        """Let it run on. Returns the value of its next pause, ``None`` if the function has ended; raises what it raises.

        Args:
            sent: the value that its present pause returns.
        """
        if not self._thread.ident:
            self._thread.start()
        self._inbox.put(sent)
        value, error = self._outbox.get()
        if error is not None:
            raise error
        return value

    def pause(self, value: Any) -> Any:
        """Called inside: stop until the next :meth:`resume`, and return what that sends."""
        self._outbox.put((value, None))
        sent = self._inbox.get()
        self.check()
        return sent

    def check(self) -> None:
        """Called inside: raise :class:`CoroutineClosed` if it was closed."""
        if self._is_closing:
            raise CoroutineClosed

    def close(self) -> None:
        """End it at its present pause or its next check, by an exception, so that its ``finally`` clauses run."""
        self._is_closing = True
        if self._thread.ident and not self.is_done:
            self._inbox.put(None)
            self._thread.join()


class CoroutineClosed(BaseException):
    """Raised inside a function that was closed."""


def _settings_of_this_thread() -> list[AbstractContextManager[Any]]:
    """Contexts in which another thread has the settings of torch that this one has."""
    lowered = [kind for kind in DEVICES if torch.is_autocast_enabled(kind)]
    found: list[Any] = [torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)) for kind in lowered]
    if torch.get_default_device() != torch.device("cpu"):
        found.append(torch.device(torch.get_default_device()))
    if torch.cuda.is_initialized():
        found.append(torch.cuda.device(torch.cuda.current_device()))
    return found
