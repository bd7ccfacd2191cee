"""What asks a run to stop: the first signal lets the step in hand end and be saved, a second stops at once. Output that
can no longer be written, such as into a pipe that was closed, asks as well, and counts as no signal: Ctrl-C ends the
reader, too."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from trimodal.arguments import telling_of_output

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C, what ends jobs, what cluster schedulers send some time before


class Interruption:
    """Knows what has asked to stop.

    with Interruption() as interruption:
        with interruption.can_wait():  # here somebody looks at `asked`, after each step
            ...
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.asked = ""  # name of the signal, or what cannot be written
        self.now = now
        self._waits = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._signalled_s: float | None = None
        # torchrun sends on to its processes what a terminal has sent to them already
        self._echo_s = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for name in SIGNALS:
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def can_wait(self) -> Iterator[None]:
        self._waits = True
        try:
            with telling_of_output(self._cannot_write):
                yield
        finally:
            self._waits = False

    def _cannot_write(self, why: str) -> None:
        if not self.asked:
            self.asked = f"output that cannot be written ({why})"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt where there is nothing to wait for, or it was asked before."""
        name = signal.Signals(number).name
        if os.getpid() != self._process:
            if name != "SIGINT":  # a worker that reads data goes when it is told to; Ctrl-C is for its parent as well
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif self._waits and self._signalled_s is None:
            self.asked, self._signalled_s = self.asked or name, self.now()
        elif self._signalled_s is None or self.now() - self._signalled_s >= self._echo_s:
            raise KeyboardInterrupt(name)
