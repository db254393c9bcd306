"""utils/supervise.py beside stand-ins for a launcher, and beside torch.distributed.launch."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import engine_command, environment, marked_processes, run

from utils.supervise import Failure, Screen, root_cause

SUPERVISE = Path(__file__).resolve().parent.parent / "utils" / "supervise.py"


@pytest.fixture
def script(tmp_path):
    """Write a Python script that begins with the usual imports; returns its path."""

    def write(body, name="script.py"):
        path = tmp_path / name
        path.write_text("import os, signal, subprocess, sys, time\n" + body)
        return path

    return write


def command_of(path):
    return [sys.executable, SUPERVISE, "--", sys.executable, "-u", path]


def start(command):
    """Start a command in the background."""
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "has not come about in time"
        time.sleep(0.02)


def child_of(process):
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


class TestScreen:
    """Which lines are kept from the screen, and what is read from them."""

    def show(self, text, tmp_path, interrupted=False):
        path = tmp_path / "screen"
        with path.open("wb") as out:
            screen = Screen(out.fileno(), launcher=77)
            screen.interrupted = interrupted
            for line in text.encode().splitlines(keepends=True):
                screen.line(line)
            screen.flush()
        return screen, path.read_text()

    def test_the_report_of_the_launcher_is_read_and_not_shown(self, tmp_path):
        screen, shown = self.show("from a worker\n" + LOG + TRACEBACK + REPORT, tmp_path)
        assert shown == "from a worker\n"
        assert screen.failures == [
            Failure("2026-11-24_10:20:09", 0, -15),
            Failure("2026-11-24_10:20:08", 1, -9),
        ]

    def test_a_workers_traceback_and_log_are_shown_as_they_are(self, tmp_path):
        text = TRACEBACK + "ValueError: boom\n" + LOG.replace(" 77 ", " 78 ") + "[rank0]:" + LOG
        assert self.show(text, tmp_path)[1] == text

    def test_tracebacks_of_ctrl_c_are_left_out_once_it_has_come(self, tmp_path):
        text = TRACEBACK + "KeyboardInterrupt\n"
        assert self.show(text, tmp_path)[1] == text
        assert self.show(text, tmp_path, interrupted=True)[1] == ""


LOG = (
    "E1124 10:20:09.472000 77 torch/distributed/elastic/multiprocessing/api.py:1002] failed "
    "(exitcode: -9) local_rank: 1 (pid: 7969) of binary: /usr/bin/python\n"
)
TRACEBACK = """Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
"""
REPORT = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
======================================================
cifar.py FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_10:20:09
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7986)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 7986
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_10:20:08
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 7987)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 7987
======================================================
"""


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([("1", 0, -15), ("1", 1, 2)], 1),
        ([("1", 1, -9), ("1", 0, 3)], 1),  # rank 0 lost its connection to rank 1
        ([("9", 1, -9), ("1", 0, 3)], 0),  # rank 1 was stuck and the launcher killed it
        ([("1", 1, 2), ("1", 0, 3)], 1),
        ([("1", 1, 3), ("1", 0, 3)], 0),
        ([("1", 1, -15)], 1),
    ],
)
def test_the_worker_that_failed_first_is_found(failures, rank):
    assert root_cause([Failure(*failure) for failure in failures]).rank == rank


class TestBesideAnyLauncher:
    def test_output_passes_as_it_is_and_soon(self, script):
        path = script(
            "sys.stderr.buffer.write(b'bytes \\xc3\\xa9\\n no end of line')\n"
            "sys.stderr.flush()\nprint('out', flush=True)\ntime.sleep(60)"
        )
        process = start(command_of(path))
        begin = time.monotonic()
        shown = b""
        while not shown.endswith(b"no end of line"):
            shown += os.read(process.stderr.fileno(), 100)
        assert shown == b"bytes \xc3\xa9\n no end of line"
        assert process.stdout.readline() == "out\n"
        assert time.monotonic() - begin < 5
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_reaches_the_launcher_once_and_gives_the_exit_code(self, script, number):
        path = script(
            "def take(number, _):\n    print('got', number, flush=True)\n"
            f"signal.signal({number}, take)\nprint('ready', flush=True)\n"
            "time.sleep(0.5)\ntime.sleep(0.5)\nsys.exit(1)"
        )
        process = start(command_of(path))
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert out == f"got {number:d}\n"
        assert err == ""

    def test_a_second_signal_ends_what_does_not_listen(self, script):
        path = script(STUBBORN + "subprocess.Popen([sys.executable, __file__, 'child'])\n" + WAIT)
        before = marked_processes()
        process = start(command_of(path))
        assert process.stdout.readline() == process.stdout.readline() == "ready\n"
        process.terminate()
        time.sleep(0.7)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
        assert marked_processes() <= before

    def test_hangups_that_are_ignored_stay_ignored(self, script):
        """As under nohup."""
        path = script("print('ready', flush=True)\ntime.sleep(1)")
        process = start(["nohup", *command_of(path)])
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(10) == 0

    def test_orphans_of_a_killed_launcher_are_ended(self, script):
        path = script(
            "if len(sys.argv) == 1:\n"
            "    subprocess.Popen([sys.executable, __file__, '-'], start_new_session=True)\n"
            "    time.sleep(60)\n"
            "print('ready', flush=True)\ntime.sleep(60)"
        )
        before = marked_processes()
        process = start(command_of(path))
        assert process.stdout.readline() == "ready\n"
        os.kill(child_of(process.pid), signal.SIGKILL)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 3
        assert err == (
            "error: the launcher was ended by signal 9 (SIGKILL); training has stopped\n"
        )
        assert marked_processes() <= before

    @pytest.mark.parametrize(("code", "wanted"), [(0, 0), (2, 2), (75, 75), (1, 3), (9, 3)])
    def test_exit_codes_of_a_launcher_that_reports_nothing(self, script, code, wanted):
        result = run(command_of(script(f"sys.exit({code})")))
        assert result.returncode == wanted
        last = f"error: the launcher failed with exit code {code}; training has stopped\n"
        assert result.stderr == (last if wanted == 3 else "")

    def test_a_launcher_that_fails_by_itself_may_say_why(self, script):
        log = "'E1124 10:20:09.472000 %d torch/distributed/run.py:1] the port is taken'"
        result = run(command_of(script(f"print({log} % os.getpid(), file=sys.stderr)\n1 / 0\n")))
        assert result.returncode == 3
        for text in ("the port is taken", "Traceback", "ZeroDivisionError", "error: the launcher"):
            assert text in result.stderr

    def test_a_reader_that_goes_away_does_not_end_the_training(self, script, tmp_path):
        path = script(
            "for _ in range(20000):\n    print('x' * 80, file=sys.stderr)\n"
            f"open({str(tmp_path / 'done')!r}, 'w')"
        )
        process = start(command_of(path))
        process.stderr.close()
        assert process.wait(20) == 0
        assert (tmp_path / "done").exists()

    def test_a_command_that_does_not_exist_is_bad_input(self):
        result = run([sys.executable, SUPERVISE, "--", "no-such-program"])
        assert result.returncode == 2
        assert result.stderr == "error: cannot start no-such-program: No such file or directory\n"


STUBBORN = "for number in (1, 2, 15):\n    signal.signal(number, signal.SIG_IGN)\n"
WAIT = "print('ready', flush=True)\ntime.sleep(60)"
STUBBORN += f"if len(sys.argv) > 1:\n    {WAIT.replace(chr(10), chr(10) + '    ')}\n"

# A worker, told what to do on each rank by its arguments.
WORKER = """
what = sys.argv[-2:][int(os.environ["RANK"])]
os.write(1, b"ready\\n")
if what.startswith("exit"):
    sys.exit(int(what[4:]))
if what == "raise":
    raise ValueError("boom")
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


class TestBesideTorch:
    """What is on the screen, and the exit code, when workers of torch.distributed.launch end."""

    def command(self, path, *what):
        return [sys.executable, SUPERVISE, "--", *engine_command("dist", 2, path), *what]

    @pytest.mark.parametrize(
        ("what", "code", "shown"),
        [
            (("exit2", "exit2"), 2, ""),
            (
                ("wait", "killed"),
                3,
                "error: rank 1 was ended by signal 9 (SIGKILL); training has stopped\n",
            ),
        ],
    )
    def test_a_failure_is_one_line_and_an_exit_code(self, script, what, code, shown):
        before = marked_processes()
        result = run(self.command(script(WORKER), *what))
        assert result.returncode == code
        assert result.stderr == shown
        assert marked_processes() <= before

    def test_an_exception_comes_through_and_its_rank_is_named_last(self, script):
        result = run(self.command(script(WORKER), "wait", "raise"))
        assert result.returncode == 3
        first, *_, last = result.stderr.splitlines()
        assert first == "Traceback (most recent call last):"
        assert "\nValueError: boom\n" in result.stderr
        assert "torch" not in result.stderr
        assert last == "error: rank 1 failed with exit code 1; training has stopped"

    def test_a_killed_supervisor_takes_everything_with_it(self, script):
        before = marked_processes()
        process = start(self.command(script(WORKER), "wait", "wait"))
        assert process.stdout.readline() == process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        wait_until(lambda: marked_processes() <= before)

    def test_ctrl_c_at_the_terminal_ends_everything_in_silence(self, script):
        before = marked_processes()
        command = [str(word) for word in self.command(script(WORKER), "wait", "wait")]
        process, terminal = pty.fork()
        if process == 0:
            os.execve(command[0], command, environment())
        shown = b""
        while shown.count(b"ready") < 2:
            shown += os.read(terminal, 100)
        os.write(terminal, b"\x03")
        status = os.waitpid(process, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 130
        shown += os.read(terminal, 100)
        os.close(terminal)
        assert shown.replace(b"\r\n", b"") == b"readyready^C"
        assert marked_processes() <= before
