"""Signals that ask a run to stop or to save, and how all workers come to agree on them."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType

from utils.distributed.comm import Comm

# What a worker may ask for; of several wishes the highest counts.
NOTHING, SAVE, STOP, NOT_FINITE = range(4)

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAVING = (signal.SIGUSR2,)


class Interrupt:
    """Turns signals into a wish that all workers learn of at the same step.

    A handler only notes the wish: neither files nor collectives are safe in it. Once a step every
    worker sends its own wish and takes up what the workers have agreed on a step before, so that
    nobody waits for the answer. SIGTERM, SIGINT and SIGUSR1 ask to save and stop, SIGUSR2 to save
    and go on. A second SIGINT ends the process at once, for runs that have no launcher; any other
    repetition is a launcher's, which sends SIGTERM when the first worker has left.

    Args:
        comm: the engine.
        signals: to take up.
    """

    def __init__(
        self, comm: Comm, signals: Sequence[signal.Signals] = (*_STOPPING, *_SAVING)
    ) -> None:
        self.comm = comm
        self._own = NOTHING
        self._agreed: Callable[[], int] | None = None
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._own == STOP:
            raise KeyboardInterrupt
        self.wish(SAVE if number in _SAVING else STOP)

    def poll(self) -> int:
        """What the workers want; every rank calls this equally often. An all-reduce, overlapped."""
        agreed = self._agreed() if self._agreed else NOTHING
        self._agreed = self.comm.max_later(self._own)
        if self._own in (SAVE, NOT_FINITE):
            self._own = NOTHING  # it is on its way
        return agreed

    def wish(self, what: int) -> None:
        """Ask for something on this worker's behalf; the highest wish counts."""
        self._own = max(self._own, what)

    def close(self) -> None:
        """Take up the last answer; nothing may be on its way when the engine closes."""
        if self._agreed:
            self._agreed()
            self._agreed = None
