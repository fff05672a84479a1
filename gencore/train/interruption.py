"""Signals that end a run: the step under way is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# SIGTERM comes from job schedulers and containers, SIGHUP from a terminal that was closed. Windows has no SIGHUP.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal ended the work, as Ctrl-C does.

    Attributes:
        signal: its number; a process that it ends exits with 128 more.
    """

    def __init__(self, number: int):
        self.signal = number
        super().__init__(signal.Signals(number).name)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a process exits with that was interrupted so: 128 and the number of the signal."""
    return 128 + (interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT)


@contextlib.contextmanager
def raised_signals() -> Iterator[Callable[[], int | None]]:
    """Lets SIGTERM and SIGHUP raise :class:`Interrupted`, where they would end the process at once, in the main thread.

    So what is half done is cleared away, as at Ctrl-C. The function that it gives returns the number of the signal that
    came, None before.
    """
    caught: list[int] = []
    former: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for name in _NAMES[1:]:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                former[number] = signal.signal(number, end)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Holds back the first SIGINT, SIGTERM or SIGHUP; the function that it gives returns its number, None before.

    The second signal acts as it did outside, at once. A signal that is ignored (``nohup``, a background job of a shell)
    stays ignored. Only the main thread can hold signals back: in others, nothing is.
    """
    caught: list[int] = []
    former: dict[int, Any] = {}

    def restore() -> None:
        while former:
            signal.signal(*former.popitem())

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)
            # None: a handler that Python did not install.
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                former[number] = signal.signal(number, catch)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        restore()
