"""Starts a launcher, stays beside it, and starts it again when a worker has failed:

    python supervise.py [--tagged] [--max-restarts N] -- command ...

torch.distributed.launch answers every failure with exit code 1 and pages of text of its own, kills
workers that are still saving, and leaves them behind when it is killed itself. This small process,
which imports nothing but the standard library, passes on what the workers say, keeps the launcher's
failure report to itself, turns it into one line and an exit code, and leaves no process behind.
With --tagged the launcher is horovodrun, which puts a tag before every line of its workers and
pipes their standard output too; rank 0 then finds the terminal, if there is one, under
CIFAR_TERMINAL.

Workers that say who they are (utils/launch/heartbeat.py) get SIGTERM, SIGINT, SIGHUP and SIGUSR1 as a request
to save and leave, without the launcher, and SIGUSR2 as one to save and go on. When none of them
has begun anything new for too long, those that hold up the others are named, show their stack and
are ended. After a failure that need not come again the command is started anew, with the number of
restarts under CIFAR_RESTARTS, as soon as the last process of the attempt before is gone.

Exit codes: 0 finished, 2 bad input, 3 training failed, 75 saved and left on request; 130, 143 or
129 where a request (Ctrl-C, SIGTERM, SIGHUP) came before any worker was there, or a second one or
the time limit has cut the save short.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # started by its path: the project's folder must be found
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.errors import BAD_INPUT, FAILED, RUN_AGAIN
from utils.launch.heartbeat import VARIABLE, Listener, Worker, is_stopped
from utils.launch.output import IDLE, Screen, root_cause
from utils.launch.processes import (
    descendants,
    end_descendants,
    end_with_parent,
    has_ended,
    inherit_orphans,
    name_of,
    send,
)

STDOUT, STDERR = 1, 2
RESTARTS = "CIFAR_RESTARTS"

# Seconds between two looks at the workers and at what has been asked.
TICK = 0.1
# Seconds between two signals that make the second one a repetition and not an echo of the first.
ECHO = 0.5
# Seconds that a job gets to end after a request to leave, or after its first worker has ended.
PATIENCE = 40
# Seconds that the others get when a worker has crashed; they may have errors of their own to show.
LINGER = 5
# Seconds that a stalled worker gets to show its stack.
LAST_WORDS = 2.0


class Requests:
    """What signals ask of this process from now on.

    Attributes:
        leave: the first signal that asks to save and leave; 0 while none has come.
        saves: how many have asked to save and go on.
        insisted: whether Ctrl-C or SIGTERM has been repeated.
    """

    def __init__(self) -> None:
        self.leave, self.saves, self.insisted = 0, 0, False
        self._since = self._asked = 0.0
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup, for one
                signal.signal(number, self._take)

    def _take(self, number: int, _: object) -> None:
        if number == signal.SIGUSR2:
            self.saves += 1
            return
        now = time.monotonic()
        if not self.leave:
            self.leave, self._since = number, now
        if number in (signal.SIGINT, signal.SIGTERM):
            self._asked = self._asked or now
            self.insisted = self.insisted or now - self._asked > ECHO

    def overdue(self) -> bool:
        """Whether the time to save and leave is over."""
        waited = time.monotonic() - self._since
        return self.insisted or bool(self.leave and waited > PATIENCE)

    @property
    def code(self) -> int:
        """The exit code of a job that has been ended before it could save."""
        return 128 + (signal.SIGTERM if self.leave == signal.SIGUSR1 else self.leave)


class Outcome(NamedTuple):
    """How an attempt has ended: an exit code, and what has failed where nobody has said so."""

    code: int
    failure: str = ""


class Attempt:
    """One start of the command.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], tagged: bool, restarts: int, requests: Requests
    ) -> None:
        self.tagged = tagged
        self.requests = requests
        self.listener = Listener()
        self._asked, self._told, self._saves = False, set[int](), requests.saves
        self._outcome: Outcome | None = None  # where it is known before the launcher ends
        pipes = [os.pipe() for _ in range(1 + tagged)]
        try:
            # After setsid: what the terminal sends comes here alone.
            self.launcher = subprocess.Popen(
                command,
                stdout=pipes[1][1] if tagged else None,
                stderr=pipes[0][1],
                env=_environment(self.listener.name, restarts, tagged),
                start_new_session=True,
                preexec_fn=_begin_launcher,
            )
        finally:
            for _, writing in pipes:
                os.close(writing)
        self.screens = [Screen(out, self.launcher.pid) for out in (STDERR, STDOUT)[: len(pipes)]]
        self.readers = []
        for screen, (reading, _) in zip(self.screens, pipes, strict=True):
            screen.failures = self.screens[0].failures  # horovodrun reports on standard output
            reader = threading.Thread(target=screen.copy, args=(reading,), daemon=True)
            self.readers.append(reader)

    def run(self) -> Outcome:
        """Stay beside the launcher to its end, and end what is left then."""
        for reader in self.readers:
            reader.start()
        with closing(self.listener):
            while (code := self._wait()) is None:
                self.listener.look()
                self._pass_on_requests()
                if self._outcome is None:
                    self._judge_workers()
        left = end_descendants()
        for reader in self.readers:
            reader.join(timeout=5)
        outcome = self._outcome or self._outcome_of(code)
        if left:
            why = f"{outcome.failure}; " if outcome.failure else ""
            return Outcome(FAILED, f"{why}process {left[0]} cannot be ended")
        return outcome

    def _wait(self) -> int | None:
        try:
            return self.launcher.wait(TICK)
        except subprocess.TimeoutExpired:
            return None

    def _pass_on_requests(self) -> None:
        """Ask the workers themselves: a launcher would kill them after a few seconds."""
        living = self.listener.living()
        if self._saves < self.requests.saves:
            self._saves = self.requests.saves
            send([worker.process for worker in living], signal.SIGUSR2)
        if not self.requests.leave:
            return
        if self.requests.overdue():
            self._end(Outcome(self.requests.code))
            return
        number = self.requests.leave
        if not self._asked:
            self._asked = True
            for screen in self.screens:
                screen.interrupted = True
            if not living and number != signal.SIGUSR1:  # which waits for the first worker
                self.launcher.send_signal(number)
        new = {worker.process for worker in living} - self._told
        send(list(new), signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
        self._told |= new

    def _judge_workers(self) -> None:
        """End a job that does not go on and whose launcher does not see it."""
        ended = [worker for worker in self.listener.workers if worker.ended]
        if not ended:
            if stalled := self.listener.stalled():
                self._end_stalled(stalled)
            return
        now = time.monotonic()
        first = min(ended, key=lambda worker: worker.ended)
        crashes = [worker.ended for worker in ended if worker.code not in (0, RUN_AGAIN)]
        if now - first.ended > PATIENCE:
            codes = {worker.code for worker in self.listener.workers}
            code = codes.pop()
            if not codes and code in (0, BAD_INPUT, FAILED, RUN_AGAIN):
                self._end(Outcome(code))
            else:
                what = f"the launcher has not ended within {PATIENCE} s of rank {first.rank}"
                self._end(Outcome(FAILED, what))
        elif crashes and now - min(crashes) > LINGER:
            # The launcher goes on to report the crash.
            send([worker.process for worker in self.listener.living()], signal.SIGKILL)

    def _end_stalled(self, stalled: list[Worker]) -> None:
        """Let workers that have stalled show their stacks, and end the job."""
        outcome = Outcome(FAILED, _describe(stalled, self.listener.living()))
        stopped = [worker.process for worker in stalled if is_stopped(worker)]
        others = [worker.process for worker in stalled if worker.process not in stopped]
        if not self.tagged and self.launcher.pid not in others:
            self.launcher.send_signal(signal.SIGSTOP)  # so that it says nothing of all this
        send(stopped, signal.SIGKILL)
        send(others, signal.SIGABRT)
        deadline = time.monotonic() + LAST_WORDS
        while time.monotonic() < deadline and not all(has_ended(process) for process in others):
            time.sleep(TICK)
        time.sleep(IDLE)  # until what they have said has come through
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self._outcome = self._outcome or outcome
        send(descendants(), signal.SIGKILL)
        self.launcher.kill()  # where there is no /proc

    def _outcome_of(self, code: int) -> Outcome:
        """What the exit code and the report of the launcher mean."""
        if code == 0:
            return Outcome(0)
        who, failures = "the launcher", self.screens[0].failures
        if failures:
            _, rank, code = root_cause(failures)
            who = f"rank {rank}"
        if code in (BAD_INPUT, FAILED, RUN_AGAIN):
            return Outcome(code)  # the worker has said why
        if self._asked and (not self._told or -code in (signal.SIGTERM, signal.SIGUSR1)):
            return Outcome(self.requests.code)
        if not failures:
            self.screens[0].show_log()
        how = f"failed with exit code {code}" if code > 0 else f"was ended by {name_of(-code)}"
        return Outcome(FAILED, f"{who} {how}")


def _environment(name: str, restarts: int, tagged: bool) -> dict[str, str]:
    """What an attempt finds in its environment; nothing that an outer supervisor has said."""
    environment = {k: v for k, v in os.environ.items() if k not in (VARIABLE, RESTARTS)}
    if name:
        environment[VARIABLE] = name
    if restarts:
        environment[RESTARTS] = str(restarts)
    if tagged and os.isatty(STDOUT):
        environment["CIFAR_TERMINAL"] = os.ttyname(STDOUT)
    return environment


def _begin_launcher() -> None:
    # SIGTERM lets the launcher end its workers when this process is killed.
    end_with_parent(signal.SIGTERM)


def _describe(stalled: list[Worker], living: list[Worker]) -> str:
    """Who holds up the others, in words."""
    if len(stalled) == 1:
        who = f"rank {stalled[0].rank} (process {stalled[0].process}) has not"
    elif len(stalled) == len(living):
        who = f"none of the {len(living)} ranks has"
    else:
        ranks = ", ".join(str(worker.rank) for worker in stalled)
        who = f"ranks {ranks} (processes {', '.join(str(w.process) for w in stalled)}) have not"
    seconds = max(worker.timeout for worker in living)
    what = stalled[0].what + (", stopped by a signal" if is_stopped(stalled[0]) else "")
    return f"{who} gone on for {seconds:g} s ({what})"


def supervise(command: Sequence[str], tagged: bool = False, max_restarts: int = 0) -> int:
    """Run a launcher, horovodrun if tagged, until it need not be started again.

    Returns:
        The exit code.
    """
    inherit_orphans()
    requests = Requests()
    restarts = 0
    while True:
        try:
            attempt = Attempt(command, tagged, restarts, requests)
        except OSError as error:
            print(f"error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)
            return FAILED if restarts else BAD_INPUT
        outcome = attempt.run()
        if not outcome.failure:
            return outcome.code
        screen = attempt.screens[0]
        if restarts == max_restarts or requests.leave or descendants():
            used = f" after {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
            screen.write(f"error: {outcome.failure}; training has stopped{used}\n".encode())
            return outcome.code
        restarts += 1
        line = f"{outcome.failure}; restart {restarts} of {max_restarts} from the newest checkpoint"
        screen.write(f"{line}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    usage = "python supervise.py [--tagged] [--max-restarts N] -- command ..."
    parser = argparse.ArgumentParser(usage=usage)
    parser.add_argument("--tagged", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=0)
    options = parser.parse_args(words[:end])
    command = words[end + 1 :]
    if not command:
        parser.error("no command")
    return supervise(command, options.tagged, options.max_restarts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
