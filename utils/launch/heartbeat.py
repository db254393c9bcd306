"""Watch: each rank says what it begins, so that a rank that goes on no longer is found and named.

The two ends of one connection: a Watch in every worker, and the Listener of utils/launch/supervisor.py,
whose name the workers find in the environment. It is a Unix socket with an abstract name (Linux):
no file, no port, nothing that could be left over, and the kernel says who connects. Each rank has
a queue of its own, of some hundred messages, so that none is lost while the supervisor sleeps; it
is not woken by them. Workers that find no supervisor end themselves when they stand still.
"""

import contextlib
import faulthandler
import os
import re
import secrets
import socket
import struct
import sys
import time
from dataclasses import dataclass

from utils.launch.processes import has_ended, state

VARIABLE = "CIFAR_WATCH"

_STDERR = 2
# Seconds that a rank without a supervisor waits longer than the timeout, whose errors come first.
_LATER = 30
_FOREVER = 999_999_999.0
_UNKNOWN = -1  # the rank of who has not said hello
# Bytes of a message; seconds for which one look counts at most, as this process may have slept.
_LONGEST, _LOOK = 256, 1.0
_AT_ONCE = 1_000  # connections that a look takes in at most

# Printable characters alone: the text goes to a terminal.
_HELLO = re.compile(rb"hello (\d{1,9}) (\d{1,9}(?:\.\d{1,9})?)")
_BEAT = re.compile(rb"(\d{1,18}) ([ -~]*)")
_LEAVE = re.compile(rb"leave (\d{1,3})")


class Watch:
    """A rank's end. The rank is idle at first; one thread may call the methods.

    Attributes:
        begun: whether ``begin`` has been called.
    """

    def __init__(self) -> None:
        self.begun = False
        self._connection: socket.socket | None = None
        self._timeout = _FOREVER
        self._count = 0
        self._next_arming = 0.0

    def begin(self, rank: int, timeout: float) -> None:
        """Make this rank known.

        Signal handlers must be in place before: a rank that is known gets signals directly.

        Args:
            rank: of this worker.
            timeout: seconds without anything new, on any rank, that are taken for a stall; above
                0, math.inf for never.
        """
        faulthandler.enable(_STDERR)  # SIGABRT prints the stack
        self.begun = True
        self._timeout = min(timeout, _FOREVER)
        self._connection = _connect()
        self._send(b"hello %d %f" % (rank, self._timeout))

    def beat(self, what: str) -> None:
        """Say that this rank begins something new, such as "training step 12 of epoch 3"."""
        self._count += 1
        if self._connection is None:
            self._arm()
            return
        with contextlib.suppress(OSError):  # a full queue: a later beat says more
            self._connection.send(b"%d %s" % (self._count, what.encode("ascii", "replace")[:200]))

    def idle(self) -> None:
        """Say that what follows may take as long as it likes, until the next beat."""
        faulthandler.cancel_dump_traceback_later()
        self._next_arming = 0.0
        self._send(b"%d " % self._count)

    def leave(self, code: int) -> None:
        """Say that this rank ends of its own will with an exit code; call it last.

        Who ends without a word has crashed, and the others cannot go on.
        """
        faulthandler.cancel_dump_traceback_later()
        self._send(b"leave %d" % code)

    def _send(self, message: bytes) -> None:
        """Send what must not get lost."""
        if self._connection is None:
            return
        with contextlib.suppress(OSError):
            self._connection.setblocking(True)
            self._connection.send(message)
            self._connection.setblocking(False)

    def _arm(self) -> None:
        """Where nobody watches: print the stack and end when this is not called again in time."""
        now = time.monotonic()
        if now >= self._next_arming:  # it starts a thread
            faulthandler.dump_traceback_later(self._timeout + _LATER, exit=True, file=_STDERR)
            self._next_arming = now + 1


def _connect() -> socket.socket | None:
    name = os.environ.get(VARIABLE)
    if not name or sys.platform != "linux":
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"\0{name}")
    except OSError:  # a worker on another machine
        connection.close()
        return None
    return connection


@dataclass
class Worker:
    """What is known of a rank.

    Attributes:
        rank, process, timeout: as its hello and the kernel say.
        count: how often it has begun something.
        what: that; empty while it is idle.
        code: the exit code that it has announced.
        ended: when it was seen to have ended, in the seconds of time.monotonic(); 0 before.
    """

    rank: int
    process: int
    timeout: float
    count: int = 0
    what: str = ""
    code: int | None = None
    ended: float = 0.0


class Listener:
    """The supervisor's end. Close it after use.

    Attributes:
        name: for the environment of the workers; empty where there are no such sockets.
        workers: that have said hello, the ended ones too.
        quiet: seconds in which nothing new has been said.
    """

    def __init__(self) -> None:
        self.name = ""
        self.workers: list[Worker] = []
        self.quiet = 0.0
        self._last = time.monotonic()
        self._connections: dict[socket.socket, Worker] = {}
        self._door: socket.socket | None = None
        if sys.platform == "linux":
            self.name = secrets.token_hex(16)
            self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._door.bind(f"\0{self.name}")
            self._door.listen(1024)
            self._door.setblocking(False)

    def living(self) -> list[Worker]:
        """The workers that have not been seen to end."""
        return [worker for worker in self.workers if not worker.ended]

    def look(self) -> None:
        """Take in what the workers have said, and see which of them have ended."""
        now = time.monotonic()
        self.quiet += min(now - self._last, _LOOK)
        self._last = now
        ended = [worker for worker in self.living() if has_ended(worker.process)]
        self._accept()
        for connection, worker in list(self._connections.items()):
            self._hear(connection, worker)
        for worker in ended:
            worker.ended = now

    def stalled(self) -> list[Worker]:
        """The workers that hold up the others; none while anything goes on or a rank is idle.

        They are those that a signal has stopped, else those that have begun the least.
        """
        living = self.living()
        if not living or not all(worker.what for worker in living):
            return []
        if self.quiet < max(worker.timeout for worker in living):
            return []
        least = min(worker.count for worker in living)
        stopped = [worker for worker in living if is_stopped(worker)]
        return stopped or [worker for worker in living if worker.count == least]

    def close(self) -> None:
        """Let go of everything."""
        for connection in self._connections:
            connection.close()
        if self._door is not None:
            self._door.close()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):  # whoever connects without end may not keep the supervisor here
            if self._door is None or sys.platform != "linux":
                return
            try:
                connection, _ = self._door.accept()
            except OSError:
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            process, user, _ = struct.unpack("iII", credentials)
            if user == os.geteuid():
                connection.setblocking(False)
                self._connections[connection] = Worker(_UNKNOWN, process, 0.0)
            else:  # the names are public and anybody may connect
                connection.close()

    def _hear(self, connection: socket.socket, worker: Worker) -> None:
        """Read what has come through a connection; of several beats the last one counts."""
        beat = b""
        for _ in range(10_000):
            try:
                message = connection.recv(_LONGEST)
            except BlockingIOError:
                break
            except OSError:
                message = b""
            if not message:
                del self._connections[connection]
                connection.close()
                break
            if message[:1].isdigit():
                beat = message
            elif (found := _HELLO.fullmatch(message)) and worker.rank == _UNKNOWN:
                worker.rank, worker.timeout = int(found[1]), float(found[2])
                self.workers.append(worker)
                self.quiet = 0.0
            elif found := _LEAVE.fullmatch(message):
                worker.code = int(found[1])
        if found := _BEAT.fullmatch(beat):
            worker.count, worker.what = int(found[1]), found[2].decode()
            self.quiet = 0.0


def is_stopped(worker: Worker) -> bool:
    """Whether a signal, or a debugger, has stopped a worker."""
    return state(worker.process) in ("T", "t")
