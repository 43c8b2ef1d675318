"""Signals that end a command.

SIGTERM and SIGUSR1   a wish to stop, which the run asks about between steps
Ctrl-C                ends at once, but for what has to be left in order
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers the first of STOP_SIGNALS, and ``tells`` of it; a second one ends the process at
    once.

    Installs its handlers when it is made and puts the former ones back in ``restore``. Where it is
    not made in the main thread, Python allows no handlers: signals then do what they did before.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self._tells = tells
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._receive) for name in STOP_SIGNALS}

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for name, handler in self._before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for name in STOP_SIGNALS:
            # Not a handler of ours, which would wait for an operation of torch to return.
            signal.signal(name, signal.SIG_DFL)
        if not self._tells:
            return
        message = f"{self.received.name}: finishing the step and saving (a second one ends at once)"
        with contextlib.suppress(OSError):  # os.write, because stderr's buffer may be in use
            os.write(2, f"{message}\n".encode())


@contextmanager
def interruptible_once() -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt; a second one ends the process then and there.

    Raised while the first one is leaving, it would tear Python down under threads that are still in
    torch, which aborts. Where others than Python handle Ctrl-C, they do.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) == interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
