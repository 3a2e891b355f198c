"""SIGINT and SIGTERM as a wish to stop, which a run heeds between two updates."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; its newest checkpoint holds ``epochs_saved`` whole epochs."""

    def __init__(self, signal_number: int, epochs_saved: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.epochs_saved = epochs_saved


class Stop:
    """The wish: the number of the signal that came, or None."""

    signal_number: int | None = None

    def check(self, epochs_saved: int) -> None:
        """Raise `Interrupted` if one came."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number, epochs_saved)


@contextlib.contextmanager
def heeded(on_signal: Callable[[int], Any] = lambda number: None) -> Iterator[Stop]:
    """Turn the first of the two signals into a wish; a second one acts as it did before. Nothing in other threads.

    Args:
        on_signal: called with its number when it comes.
    """
    stop = Stop()
    previous: dict[int, Any] = {}

    def handle(number: int, _: Any) -> None:
        stop.signal_number = number
        signal.signal(number, previous[number])
        on_signal(number)

    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours to take
        for number in (signal.SIGINT, signal.SIGTERM):
            # None: a handler that was not installed from Python.
            previous[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)
