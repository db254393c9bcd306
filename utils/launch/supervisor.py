"""Supervisor: starts a launcher, stays beside it, and starts it again when a worker has failed.

    python utils/launch/supervisor.py [--tagged] [--max-restarts N] -- command ...

The launcher, utils/launch/cli.py, calls ``supervise`` in its own process.

torch.distributed.launch answers every failure with exit code 1 and pages of text of its own, kills
workers that are still saving, and leaves them behind when it is killed itself. This module,
which imports nothing but the standard library, passes on the output of the workers, keeps the
launcher's failure report to itself, turns it into one line and an exit code, and leaves no process
behind. With --tagged the launcher is horovodrun, which puts a tag before every line of its workers
and pipes their standard output too; the environment variable CIFAR_TERMINAL then names the
terminal, if there is one, to rank 0.

Workers that have registered (utils/launch/heartbeat.py) get SIGTERM, SIGINT, SIGHUP and SIGUSR1
directly, not through the launcher, as a request to save and stop, and SIGUSR2 as a request to save
and continue. When no worker has started anything new for too long, the workers that hold up the
others are named, show their stacks and are ended. After a failure that need not occur again the
command is started again as soon as the last process of the previous attempt is gone. The number of
restarts is in the environment variable CIFAR_RESTARTS, and CIFAR_JOB holds a random id that all
attempts have in common, by which they know what they have saved.

Exit codes: 0 finished, 2 bad input, 3 training failed, 75 saved and stopped on request; 130, 143 or
129 where a request (Ctrl-C, SIGTERM, SIGHUP) came before any worker had registered, or where a
second request or the time limit has cut the save short.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Started by its path, it must find the project's folder itself.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.errors import BAD_INPUT, EXPLAINED, FAILED, RUN_AGAIN
from utils.launch.heartbeat import (
    JOB_VARIABLE,
    RESTARTS_VARIABLE,
    SERVER_VARIABLE,
    TERMINAL_VARIABLE,
    HeartbeatServer,
    Worker,
)
from utils.launch.output import FLUSH_DELAY, OutputFilter, root_cause
from utils.launch.processes import (
    descendants,
    describe_signal,
    end_descendants,
    end_with_parent,
    has_ended,
    inherit_orphans,
    is_stopped,
    send_signal,
)

STDOUT, STDERR = 1, 2

# Seconds between two polls of the workers and of the requests.
POLL_INTERVAL = 0.1
# Seconds after which a second signal is a repetition; before, it may be an echo of the first.
ECHO_INTERVAL = 0.5
# Seconds that a job gets to end after a request to stop, or after its first worker has ended.
END_TIMEOUT = 40
# Seconds that the other workers get after a crash; they may have errors of their own to show.
CRASH_TIMEOUT = 5
# Seconds that a stalled worker gets to show its stack.
STACK_TIMEOUT = 2.0


class Requests:
    """The requests that signals make to this process.

    Attributes:
        stop_signal: The first signal that asks to save and stop; 0 while none has come.
        save_count: The number of signals that have asked to save and continue.
        repeated: Whether Ctrl-C or SIGTERM has been repeated.
    """

    def __init__(self) -> None:
        """Install the signal handlers."""
        self.stop_signal, self.save_count, self.repeated = 0, 0, False
        self._stop_time = self._first_time = 0.0
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
        for number in numbers:
            # nohup ignores SIGHUP, for example. tools/seeds.py ignores SIGUSR2 until this is there.
            if number == signal.SIGUSR2 or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """The exit code of a job that has been ended before it could save."""
        usr1 = self.stop_signal == signal.SIGUSR1
        return 128 + (signal.SIGTERM if usr1 else self.stop_signal)

    def is_overdue(self) -> bool:
        """Return whether the time to save and stop is over."""
        waited = time.monotonic() - self._stop_time
        return self.repeated or bool(self.stop_signal and waited > END_TIMEOUT)

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGUSR2:
            self.save_count += 1
            return
        now = time.monotonic()
        if not self.stop_signal:
            self.stop_signal, self._stop_time = number, now
        if number in (signal.SIGINT, signal.SIGTERM):
            self._first_time = self._first_time or now
            self.repeated = self.repeated or now - self._first_time > ECHO_INTERVAL


class Outcome(NamedTuple):
    """How an attempt has ended.

    Attributes:
        code: The exit code.
        failure: What has failed; empty where a worker has already said so.
    """

    code: int
    failure: str = ""


class Attempt:
    """One start of the command.

    Attributes:
        filters: The filters of standard error and, of a tagged command, of standard output.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        tagged: bool,
        restarts: int,
        requests: Requests,
    ) -> None:
        """Start the command.

        Args:
            command: The launcher and its arguments.
            environment: The environment of the launcher.
            tagged: Whether the launcher is horovodrun.
            restarts: The number of attempts before this one.
            requests: The requests of the user.

        Raises:
            OSError: The command cannot be started.
        """
        self._tagged = tagged
        self._requests = requests
        self._server = HeartbeatServer()
        self._stop_forwarded, self._notified_pids = False, set[int]()
        self._saves_forwarded = requests.save_count
        self._outcome: Outcome | None = None  # Set where it is known before the launcher ends.
        pipes = [os.pipe() for _ in range(1 + tagged)]
        try:
            # After setsid the launcher gets no signals from the terminal.
            self._launcher = subprocess.Popen(
                command,
                stdout=pipes[1][1] if tagged else None,
                stderr=pipes[0][1],
                env=_launcher_environment(environment, self._server.name, restarts, tagged),
                start_new_session=True,
                # In the launcher's process; SIGTERM lets it end its workers.
                preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()),
            )
        finally:
            for _, write_end in pipes:
                os.close(write_end)
        self.filters = [
            OutputFilter(out, self._launcher.pid) for out in (STDERR, STDOUT)[: len(pipes)]
        ]
        self._readers = []
        for output, (read_end, _) in zip(self.filters, pipes, strict=True):
            # horovodrun reports failures on standard output.
            output.failures = self.filters[0].failures
            reader = threading.Thread(target=output.forward, args=(read_end,), daemon=True)
            self._readers.append(reader)

    def run(self) -> Outcome:
        """Supervise the launcher until it ends, and end the processes that it has left."""
        for reader in self._readers:
            reader.start()
        with closing(self._server):
            while (code := self._wait()) is None:
                self._server.poll()
                self._forward_requests()
                if self._outcome is None:
                    self._check_workers()
        remaining = end_descendants()
        for reader in self._readers:
            reader.join(timeout=5)
        outcome = self._outcome or self._outcome_of(code)
        if remaining:
            why = f"{outcome.failure}; " if outcome.failure else ""
            return Outcome(FAILED, f"{why}process {remaining[0]} cannot be ended")
        return outcome

    def _wait(self) -> int | None:
        """Wait for one poll interval; return the exit code of a launcher that has ended."""
        try:
            return self._launcher.wait(POLL_INTERVAL)
        except subprocess.TimeoutExpired:
            return None

    def _forward_requests(self) -> None:
        """Forward requests to the workers: a launcher would kill them after a few seconds."""
        pids = self._living_pids()
        if self._saves_forwarded < self._requests.save_count:
            self._saves_forwarded = self._requests.save_count
            send_signal(pids, signal.SIGUSR2)
        if not self._requests.stop_signal:
            return
        if self._requests.is_overdue():
            self._end(Outcome(self._requests.exit_code))
            return
        number = self._requests.stop_signal
        if not self._stop_forwarded:
            self._stop_forwarded = True
            for output in self.filters:
                output.interrupted = True
            # SIGUSR1 waits for the first worker.
            if not pids and number != signal.SIGUSR1:
                self._launcher.send_signal(number)
        new = set(pids) - self._notified_pids
        send_signal(list(new), signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
        self._notified_pids |= new

    def _check_workers(self) -> None:
        """End a job that does not continue and whose launcher does not notice."""
        ended = [worker for worker in self._server.workers if worker.ended_at]
        if not ended:
            if stalled := self._server.stalled():
                self._end_stalled(stalled)
            return
        now = time.monotonic()
        first = min(ended, key=lambda worker: worker.ended_at)
        crashes = [worker.ended_at for worker in ended if worker.exit_code not in (0, RUN_AGAIN)]
        if now - first.ended_at > END_TIMEOUT:
            codes = {worker.exit_code for worker in self._server.workers}
            code = codes.pop()
            if not codes and code in (0, *EXPLAINED):
                self._end(Outcome(code))
            else:
                what = f"the launcher has not ended within {END_TIMEOUT} s of rank {first.rank}"
                self._end(Outcome(FAILED, what))
        elif crashes and now - min(crashes) > CRASH_TIMEOUT:
            # The launcher survives this and reports the crash.
            send_signal(self._living_pids(), signal.SIGKILL)

    def _living_pids(self) -> list[int]:
        return [worker.pid for worker in self._server.living()]

    def _end_stalled(self, stalled: list[Worker]) -> None:
        """Let workers that have stalled show their stacks, and end the job."""
        outcome = Outcome(FAILED, _describe_stall(stalled, self._server.living()))
        stopped = [worker.pid for worker in stalled if is_stopped(worker.pid)]
        others = [worker.pid for worker in stalled if worker.pid not in stopped]
        if not self._tagged and self._launcher.pid not in others:
            self._launcher.send_signal(signal.SIGSTOP)  # It must not report what happens here.
        send_signal(stopped, signal.SIGKILL)
        send_signal(others, signal.SIGABRT)
        deadline = time.monotonic() + STACK_TIMEOUT
        while time.monotonic() < deadline and not all(has_ended(pid) for pid in others):
            time.sleep(POLL_INTERVAL)
        time.sleep(FLUSH_DELAY)  # The stacks must pass the filters before everything ends.
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        """End the job with an outcome, unless an earlier one is set."""
        self._outcome = self._outcome or outcome
        send_signal(descendants(), signal.SIGKILL)
        self._launcher.kill()  # Without /proc nothing else has ended it.

    def _outcome_of(self, code: int) -> Outcome:
        """Return what the exit code and the report of the launcher mean."""
        if code == 0:
            return Outcome(0)
        who, failures = "the launcher", self.filters[0].failures
        if failures:
            _, rank, code = root_cause(failures)
            who = f"rank {rank}"
        if code in EXPLAINED:
            return Outcome(code)  # The worker has said why.
        by_request = not self._notified_pids or -code in (signal.SIGTERM, signal.SIGUSR1)
        if self._stop_forwarded and by_request:
            return Outcome(self._requests.exit_code)
        if not failures:
            self.filters[0].show_log()
        if code < 0:
            return Outcome(FAILED, f"{who} was ended by {describe_signal(-code)}")
        return Outcome(FAILED, f"{who} failed with exit code {code}")


def _launcher_environment(
    given: Mapping[str, str], server_name: str, restarts: int, tagged: bool
) -> dict[str, str]:
    """Return the environment of an attempt, without the variables of an outer supervisor."""
    own = (SERVER_VARIABLE, RESTARTS_VARIABLE)
    environment = {key: value for key, value in given.items() if key not in own}
    if server_name:
        environment[SERVER_VARIABLE] = server_name
    if restarts:
        environment[RESTARTS_VARIABLE] = str(restarts)
    if tagged and os.isatty(STDOUT):
        with suppress(OSError):  # In a container the terminal may have no name.
            environment[TERMINAL_VARIABLE] = os.ttyname(STDOUT)
    return environment


def _describe_stall(stalled: list[Worker], living: list[Worker]) -> str:
    """Return which workers hold up the others, for how long and in what."""
    if len(stalled) == 1:
        who = f"rank {stalled[0].rank} (process {stalled[0].pid}) has not"
    elif len(stalled) == len(living):
        who = f"none of the {len(living)} ranks has"
    else:
        ranks = ", ".join(str(worker.rank) for worker in stalled)
        who = f"ranks {ranks} (processes {', '.join(str(w.pid) for w in stalled)}) have not"
    seconds = max(worker.timeout for worker in living)
    note = ", stopped by a signal" if is_stopped(stalled[0].pid) else ""
    return f"{who} gone on for {seconds:g} s ({stalled[0].activity}{note})"


def supervise(
    command: Sequence[str],
    environment: Mapping[str, str],
    tagged: bool = False,
    max_restarts: int = 0,
) -> int:
    """Run a launcher, and start it again after failures that need not occur again.

    Args:
        command: The launcher and its arguments.
        environment: The environment of the launcher.
        tagged: Whether the launcher is horovodrun.
        max_restarts: The number of restarts that are allowed.

    Returns:
        The exit code.
    """
    inherit_orphans()
    requests = Requests()
    environment = {**environment, JOB_VARIABLE: secrets.token_hex(16)}
    restarts = 0
    while True:
        try:
            attempt = Attempt(command, environment, tagged, restarts, requests)
        except OSError as error:
            print(f"error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
            return FAILED if restarts else BAD_INPUT
        outcome = attempt.run()
        if not outcome.failure:
            return outcome.code
        output = attempt.filters[0]
        if restarts == max_restarts or requests.stop_signal or descendants():
            used = f" after {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
            output.write(f"error: {outcome.failure}; training has stopped{used}\n".encode())
            return outcome.code
        restarts += 1
        line = f"{outcome.failure}; restart {restarts} of {max_restarts} from the newest checkpoint"
        output.write(f"{line}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    usage = "python utils/launch/supervisor.py [--tagged] [--max-restarts N] -- command ..."
    parser = argparse.ArgumentParser(usage=usage)
    parser.add_argument("--tagged", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=0)
    options = parser.parse_args(words[:end])
    command = words[end + 1 :]
    if not command:
        parser.error("no command")
    return supervise(command, os.environ, options.tagged, options.max_restarts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
