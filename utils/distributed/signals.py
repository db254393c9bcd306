"""Signals that ask a run to stop or to save, and how all workers come to agree on them."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType

from utils.distributed.comm import Comm

# What a worker may request; of several requests the highest counts.
NOTHING, SAVE, STOP, NOT_FINITE = range(4)

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAVING = (signal.SIGUSR2,)


class SignalHandler:
    """Turns signals into a request that all workers learn of at the same step.

    A handler only notes the request, because neither files nor collectives are safe in it. Once a
    step every worker sends its own request and takes up what the workers have agreed on a step
    before, so that nobody waits for the answer. SIGTERM, SIGINT and SIGUSR1 ask to save and stop,
    SIGUSR2 to save and continue. A second SIGINT ends the process at once, for runs that have no
    launcher. Any other repetition is a launcher's, which sends SIGTERM when the first worker has
    ended.

    Args:
        comm: The engine.
        signals: The signals to handle.
    """

    def __init__(
        self, comm: Comm, signals: Sequence[signal.Signals] = (*_STOPPING, *_SAVING)
    ) -> None:
        """Install the handlers."""
        self.comm = comm
        self._own = NOTHING
        self._agreed: Callable[[], int] | None = None
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._own == STOP:
            raise KeyboardInterrupt
        self.request(SAVE if number in _SAVING else STOP)

    def poll(self) -> int:
        """Return what the workers request; every rank calls this equally often.

        The all-reduce overlaps with the next step.
        """
        agreed = self._agreed() if self._agreed else NOTHING
        self._agreed = self.comm.all_reduce_max_async(self._own)
        if self._own in (SAVE, NOT_FINITE):
            self._own = NOTHING  # It is on its way.
        return agreed

    def request(self, what: int) -> None:
        """Make a request on this worker's behalf; the highest one counts."""
        self._own = max(self._own, what)

    def close(self) -> None:
        """Take up the last answer; nothing may be on its way when the engine closes."""
        if self._agreed:
            self._agreed()
            self._agreed = None
