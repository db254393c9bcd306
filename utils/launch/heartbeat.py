"""Heartbeat: each rank reports every activity that it starts, so that a stalled rank is found.

A Heartbeat in every worker sends messages to the HeartbeatServer of utils/launch/supervisor.py. The
workers find the server's name in the environment. The connection is a Unix socket with an abstract
name (Linux): there is no file and no port that could be left over, and the kernel tells the id of
the connected process. Each rank has a queue of its own for some hundred messages, so none is lost
while the supervisor sleeps, and messages do not wake the supervisor up. A worker that finds no
server ends itself when it stalls.
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

from utils.launch.processes import has_ended, is_stopped

# The environment variables by which the supervisor tells its workers the name of its server, what
# tells their job from all others, the number of restarts, and the terminal that horovodrun hides.
SERVER_VARIABLE, JOB_VARIABLE = "CIFAR_WATCH", "CIFAR_JOB"
RESTARTS_VARIABLE, TERMINAL_VARIABLE = "CIFAR_RESTARTS", "CIFAR_TERMINAL"

_STDERR = 2
# Seconds that a rank without a server waits longer than the timeout. The collectives have the same
# timeout, and their errors say more.
_EXTRA_WAIT = 30
_NO_TIMEOUT = 999_999_999.0
_UNREGISTERED = -1  # The rank of a connection that has not registered.
_MAX_MESSAGE_BYTES = 256
# The most seconds that one poll adds to the silence: the supervisor may have been suspended.
_MAX_POLL_SECONDS = 1.0
# Limits of one poll: a client that connects or sends without end must not keep the supervisor busy.
_MAX_CONNECTIONS, _MAX_MESSAGES = 1_000, 10_000

# Only printable characters are accepted, because the text goes to a terminal.
_REGISTER = re.compile(rb"hello (\d{1,9}) (\d{1,9}(?:\.\d{1,9})?)")
_BEAT = re.compile(rb"(\d{1,18}) ([ -~]*)")
_EXIT = re.compile(rb"leave (\d{1,3})")


class Heartbeat:
    """The client in a worker. It starts idle, and only one thread may call its methods.

    Attributes:
        registered: Whether ``register`` has been called.
    """

    def __init__(self) -> None:
        """Create a heartbeat that is not connected yet."""
        self.registered = False
        self._connection: socket.socket | None = None
        self._timeout = _NO_TIMEOUT
        self._count = 0
        self._next_restart = 0.0

    def register(self, rank: int, timeout: float) -> None:
        """Connect to the supervisor and report the rank of this worker.

        Signal handlers must be installed before, because the supervisor sends signals directly to
        registered workers.

        Args:
            rank: The rank of this worker.
            timeout: The seconds without a beat of any rank that count as a stall. It is above 0, or
                math.inf for never.
        """
        faulthandler.enable(_STDERR)  # SIGABRT then prints the stack.
        self.registered = True
        self._timeout = min(timeout, _NO_TIMEOUT)
        self._connection = _connect()
        self._send(b"hello %d %f" % (rank, self._timeout))

    def beat(self, what: str) -> None:
        """Report that this rank starts something new.

        Args:
            what: The activity, such as "training step 12 of epoch 3".
        """
        self._count += 1
        if self._connection is None:
            self._restart_local_timeout()
            return
        with contextlib.suppress(OSError):  # When the queue is full, a later beat replaces it.
            self._connection.send(b"%d %s" % (self._count, what.encode("ascii", "replace")[:200]))

    def idle(self) -> None:
        """Report that this rank may take any time until its next beat."""
        faulthandler.cancel_dump_traceback_later()
        self._next_restart = 0.0
        self._send(b"%d " % self._count)

    def report_exit(self, code: int) -> None:
        """Report the exit code with which this rank is about to end; this is the last call.

        A rank that ends without this report has crashed, and the other ranks cannot continue.

        Args:
            code: The exit code.
        """
        faulthandler.cancel_dump_traceback_later()
        self._send(b"leave %d" % code)

    def _send(self, message: bytes) -> None:
        """Send a message that must not be lost, and wait for room in the queue."""
        if self._connection is None:
            return
        with contextlib.suppress(OSError):
            self._connection.setblocking(True)
            self._connection.send(message)
            self._connection.setblocking(False)

    def _restart_local_timeout(self) -> None:
        """Without a server, print the stack and end when the next call does not come in time."""
        now = time.monotonic()
        if now >= self._next_restart:  # Each restart starts a thread, so there is one per second.
            faulthandler.dump_traceback_later(self._timeout + _EXTRA_WAIT, exit=True, file=_STDERR)
            self._next_restart = now + 1


def _connect() -> socket.socket | None:
    """Return a connection to the server that the environment names, or None."""
    name = os.environ.get(SERVER_VARIABLE)
    if not name or sys.platform != "linux":
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(f"\0{name}")
    except OSError:  # The supervisor runs on another machine.
        connection.close()
        return None
    return connection


@dataclass
class Worker:
    """What the server knows of a rank.

    Attributes:
        rank: The rank that it has registered.
        pid: The process id, which the kernel provides.
        timeout: The timeout in seconds that it has registered.
        beats: The number of its beats.
        activity: What it has started last; empty while it is idle.
        exit_code: The exit code that it has reported.
        ended_at: The time.monotonic() at which it was seen to have ended; 0 while it lives.
    """

    rank: int
    pid: int
    timeout: float
    beats: int = 0
    activity: str = ""
    exit_code: int | None = None
    ended_at: float = 0.0


class HeartbeatServer:
    """The server in the supervisor. Close it after use.

    Attributes:
        name: The name for the environment of the workers; empty where there are no such sockets.
        workers: All workers that have registered, those that have ended included.
        silence: The seconds since any worker has reported anything.
    """

    def __init__(self) -> None:
        """Open a socket under a new random name."""
        self.name = ""
        self.workers: list[Worker] = []
        self.silence = 0.0
        self._last_poll = time.monotonic()
        self._connections: dict[socket.socket, Worker] = {}
        self._listener: socket.socket | None = None
        if sys.platform == "linux":
            self.name = secrets.token_hex(16)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(1024)
            self._listener.setblocking(False)

    def living(self) -> list[Worker]:
        """Return the workers that have not been seen to end."""
        return [worker for worker in self.workers if not worker.ended_at]

    def poll(self) -> None:
        """Read the messages of the workers, and find out which workers have ended."""
        now = time.monotonic()
        self.silence += min(now - self._last_poll, _MAX_POLL_SECONDS)
        self._last_poll = now
        # Ended workers are found before their messages are read, so that no last one is missed.
        ended = [worker for worker in self.living() if has_ended(worker.pid)]
        self._accept()
        for connection, worker in list(self._connections.items()):
            self._receive(connection, worker)
        for worker in ended:
            worker.ended_at = now

    def stalled(self) -> list[Worker]:
        """Return the workers that hold up the others.

        Returns:
            The workers that a signal has stopped, else those with the fewest beats; none before the
            timeout or while a rank is idle.
        """
        living = self.living()
        if not living or not all(worker.activity for worker in living):
            return []
        if self.silence < max(worker.timeout for worker in living):
            return []
        fewest = min(worker.beats for worker in living)
        stopped = [worker for worker in living if is_stopped(worker.pid)]
        return stopped or [worker for worker in living if worker.beats == fewest]

    def close(self) -> None:
        """Close all sockets."""
        for connection in self._connections:
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        """Accept the connections of processes of the same user."""
        if self._listener is None or sys.platform != "linux":
            return
        for _ in range(_MAX_CONNECTIONS):
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, user, _ = struct.unpack("iII", credentials)
            if user == os.geteuid():
                connection.setblocking(False)
                self._connections[connection] = Worker(_UNREGISTERED, pid, 0.0)
            else:  # The names of abstract sockets are public, so any user may connect.
                connection.close()

    def _receive(self, connection: socket.socket, worker: Worker) -> None:
        """Read the messages of one connection; of several beats only the last one counts."""
        beat = b""
        for _ in range(_MAX_MESSAGES):
            try:
                message = connection.recv(_MAX_MESSAGE_BYTES)
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
            elif (found := _REGISTER.fullmatch(message)) and worker.rank == _UNREGISTERED:
                worker.rank, worker.timeout = int(found[1]), float(found[2])
                self.workers.append(worker)
                self.silence = 0.0
            elif found := _EXIT.fullmatch(message):
                worker.exit_code = int(found[1])
        if found := _BEAT.fullmatch(beat):
            worker.beats, worker.activity = int(found[1]), found[2].decode()
            self.silence = 0.0
