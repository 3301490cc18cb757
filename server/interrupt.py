"""Ctrl-C as a wish: the first lets the current client finish, so that all is whole; the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM asked to stop; handlers are put back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere there is nothing to ask.
        yield lambda: False
        return
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
