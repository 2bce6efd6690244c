"""Ctrl-C and its like, put off to a moment that suits, in a `with` block: nothing outlives it."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Signals:
    """`with Signals() as stop:` catches SIGINT, SIGTERM, SIGHUP; `stop()` is which came, or 0.

    Only those whose handlers are the default ones are caught: one that is ignored, as under nohup,
    or that somebody else handles, stays so. Only the main thread can catch any. A second SIGINT
    quits at once (KeyboardInterrupt). A signal that nobody asked for by the end of the block is
    raised again there.
    """

    caught = 0
    answered = 0

    def __call__(self) -> int:
        self.answered = self.caught
        return self.answered

    def __enter__(self) -> "Signals":
        self.caught = self.answered = 0  # what came in an earlier block is over
        self.before: dict[int, Callable | int] = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
                signum = getattr(signal, name, None)
                if signum is not None and signal.getsignal(signum) in DEFAULTS:
                    self.before[signum] = signal.getsignal(signum)  # pyright: ignore[reportArgumentType]
                    signal.signal(signum, self.note)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self.before.items():
            if signal.getsignal(signum) == self.note:
                signal.signal(signum, handler)
        if self.caught and not self.answered:
            signal.raise_signal(self.caught)

    def note(self, signum: int, frame: FrameType | None) -> None:
        if self.caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or int(signum)
        with suppress(OSError):  # the terminal may be gone
            # a terminal has written ^C into the bar, which is drawn anew below
            line = b"\r\x1b[K" if os.isatty(2) else b"\n"
            os.write(2, line + b"stopping after this step; interrupt again to quit at once\n")
