"""utils/launch/supervisor.py with scripts that act as a launcher, and with real launchers."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.process import environment, marked_processes, run, wait_until
from tools.commands import engine_command
from utils.files import ROOT
from utils.launch.commands import has_horovod
from utils.launch.output import Failure, OutputFilter, root_cause
from utils.launch.processes import end_with_parent

SUPERVISOR = ROOT / "utils" / "launch" / "supervisor.py"


@pytest.fixture
def script(tmp_path):
    """Write a Python script that begins with the usual imports; returns its path."""

    def write(body, name="script.py"):
        path = tmp_path / name
        path.write_text("import os, signal, subprocess, sys, time\n" + body)
        return path

    return write


def command_of(path, *options):
    return [sys.executable, SUPERVISOR, *options, "--", sys.executable, "-u", path]


def with_time_limits(command, **seconds):
    """The same command with other time limits in utils/launch/supervisor.py."""
    changes = "".join(f"supervisor.{name} = {value}\n" for name, value in seconds.items())
    body = f"from utils.launch import supervisor\n{changes}"
    body += "supervisor.sys.exit(supervisor.main({!r}))"
    return [sys.executable, "-c", body.format([str(word) for word in command[2:]])]


def start(command):
    """Start a command in the background."""
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def child_of(process):
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


class TestOutputFilter:
    """Which lines are not shown, and what is read from them."""

    def show(self, text, tmp_path, interrupted=False):
        path = tmp_path / "output"
        with path.open("wb") as out:
            output = OutputFilter(out.fileno(), launcher=77)
            output.interrupted = interrupted
            for line in text.encode().splitlines(keepends=True):
                output.process_line(line)
            output.flush()
        return output, path.read_text()

    def test_the_report_of_the_launcher_is_read_and_not_shown(self, tmp_path):
        output, shown = self.show("from a worker\n" + LOG + TRACEBACK + REPORT, tmp_path)
        assert shown == "from a worker\n"
        assert output.failures == [
            Failure("2026-11-24_10:20:09", 0, -15),
            Failure("2026-11-24_10:20:08", 1, -9),
        ]

    def test_a_workers_traceback_and_log_are_shown_as_they_are(self, tmp_path):
        text = TRACEBACK + "ValueError: boom\n" + LOG.replace(" 77 ", " 78 ") + "[rank0]:" + LOG
        assert self.show(text, tmp_path)[1] == text

    def test_tracebacks_of_ctrl_c_are_left_out_after_a_signal(self, tmp_path):
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


def test_a_child_ends_whose_parent_has_ended_before_it_could_ask():
    """The kernel tells it of later ends only."""
    for parent, code in ((os.getpid(), 0), (os.getppid(), 1)):
        child = os.fork()
        if child == 0:
            end_with_parent(signal.SIGKILL, parent)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


class TestWithAnyLauncher:
    def test_output_is_passed_on_unchanged_and_soon(self, script):
        path = script(
            "sys.stderr.buffer.write(b'bytes \\xc3\\xa9\\n no end of line')\n"
            "sys.stderr.flush()\nprint('out', flush=True)\ntime.sleep(60)"
        )
        process = start(command_of(path))
        start_time = time.monotonic()
        shown = b""
        while not shown.endswith(b"no end of line"):
            shown += os.read(process.stderr.fileno(), 100)
        assert shown == b"bytes \xc3\xa9\n no end of line"
        assert process.stdout.readline() == "out\n"
        assert time.monotonic() - start_time < 5
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_reaches_the_launcher_once_and_gives_the_exit_code(self, script, number):
        path = script(
            "def handle(number, _):\n    print('got', number, flush=True)\n"
            f"signal.signal({number}, handle)\nprint('ready', flush=True)\n"
            "time.sleep(0.5)\ntime.sleep(0.5)\nsys.exit(1)"
        )
        process = start(command_of(path))
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 128 + number
        assert out == f"got {number:d}\n"
        assert err == ""

    def test_a_second_signal_ends_processes_that_ignore_signals(self, script):
        path = script(
            IGNORE_SIGNALS + "subprocess.Popen([sys.executable, __file__, 'child'])\n" + WAIT
        )
        before = marked_processes()
        process = start(command_of(path))
        assert process.stdout.readline() == process.stdout.readline() == "ready\n"
        terminate_twice(process)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert marked_processes() <= before

    def test_an_ignored_sighup_stays_ignored(self, script):
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

    def test_the_log_of_a_launcher_that_fails_itself_is_shown(self, script):
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
        result = run([sys.executable, SUPERVISOR, "--", "no-such-program"])
        assert result.returncode == 2
        assert result.stderr == "error: cannot start no-such-program: No such file or directory\n"


def terminate_twice(process):
    """Send SIGTERM twice, the second time after what might be an echo."""
    process.terminate()
    time.sleep(0.7)
    assert process.poll() is None
    process.terminate()


IGNORE_SIGNALS = "for number in (1, 2, 15):\n    signal.signal(number, signal.SIG_IGN)\n"
WAIT = "print('ready', flush=True)\ntime.sleep(60)"
IGNORE_SIGNALS += f"if len(sys.argv) > 1:\n    {WAIT.replace(chr(10), chr(10) + '    ')}\n"


class TestRestarts:
    def start_over(self, path, restarts=2):
        """Run a command that may be restarted twice."""
        return run(command_of(path, "--max-restarts", restarts))

    def test_after_a_failure_the_command_is_started_again_with_the_count(self, script):
        path = script(
            "restarts = os.environ.get('CIFAR_RESTARTS', 'none')\nprint(restarts, flush=True)\n"
            "if restarts == 'none':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
            "if restarts == '1':\n    sys.exit(1)"
        )
        result = self.start_over(path)
        assert result.returncode == 0
        assert result.stdout.split() == ["none", "1", "2"]
        assert result.stderr.splitlines() == [
            "the launcher was ended by signal 9 (SIGKILL); restart 1 of 2 from the newest "
            "checkpoint",
            "the launcher failed with exit code 1; restart 2 of 2 from the newest checkpoint",
        ]

    def test_the_number_of_restarts_is_limited(self, script):
        result = self.start_over(script("sys.exit(1)"), restarts=1)
        assert result.returncode == 3
        assert result.stderr.splitlines()[1:] == [
            "error: the launcher failed with exit code 1; training has stopped after 1 restart"
        ]

    @pytest.mark.parametrize("code", [0, 2, 3, 75])
    def test_success_and_failures_that_would_occur_again_are_not_restarted(self, script, code):
        result = self.start_over(script(f"print('started')\nsys.exit({code})"))
        assert (result.returncode, result.stdout) == (code, "started\n")

    def test_no_process_of_the_failed_attempt_is_left_when_the_next_begins(self, script):
        """Even if it has called setsid and ignores SIGTERM."""
        path = script(
            IGNORE_SIGNALS + "if 'CIFAR_RESTARTS' in os.environ:\n    print('again', flush=True)\n"
            "    sys.exit()\n"
            "child = subprocess.Popen([sys.executable, '-u', __file__, '-'],\n"
            "                         stdout=subprocess.PIPE, start_new_session=True)\n"
            "child.stdout.readline()\nprint(child.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        process = start(command_of(path, "--max-restarts", 1))
        orphan = int(process.stdout.readline())
        assert process.stdout.readline() == "again\n"
        assert not Path(f"/proc/{orphan}").exists()
        assert process.wait(10) == 0

    def test_fifty_restarts_leave_nothing_behind(self, tmp_path):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        body = "ls /proc/$PPID/fd | wc -l; grep Threads /proc/$PPID/status; kill -9 $$"
        result = run(
            [sys.executable, SUPERVISOR, "--max-restarts", 50, "--", "/bin/sh", "-c", body],
            env=environment(TMPDIR=str(temporary)),
        )
        assert result.returncode == 3
        lines = result.stdout.splitlines()
        files, threads = lines[0::2], lines[1::2]
        assert len(files) == 51
        counts = [int(count) for count in files]
        assert max(counts) - min(counts) < 5  # the pipe that reports a failed start comes and goes
        # The thread that reads the output may not have started yet.
        assert set(threads) <= {"Threads:\t1", "Threads:\t2"}
        assert list(temporary.iterdir()) == []

    def test_all_attempts_of_a_job_have_one_id_that_no_other_job_has(self, script):
        path = script("print(os.environ['CIFAR_JOB'], flush=True)\nsys.exit(1)")
        jobs = [self.start_over(path).stdout.split() for _ in range(2)]
        assert [len(attempts) for attempts in jobs] == [3, 3]
        assert [len({*attempts}) for attempts in jobs] == [1, 1]
        assert jobs[0] != jobs[1]

    def test_variables_of_an_outer_supervisor_are_not_passed_on(self, script):
        names = ("CIFAR_RESTARTS", "CIFAR_WATCH", "CIFAR_JOB")
        path = script(f"print(*(os.environ.get(name) for name in {names}))")
        result = run(command_of(path), env=environment(**dict.fromkeys(names, "7")))
        restarts, *ids = result.stdout.split()
        assert restarts == "None"
        assert not {"7", "None"} & {*ids}


# The start of the script of workers that register and handle the signals.
WORKERS = f"""
sys.path.insert(0, {str(ROOT)!r})
from utils.launch.heartbeat import Heartbeat

LAUNCH
received = []

def handle(number, _):
    received.append(number)
    os.write(1, b"%d got %d\\n" % (rank, number))

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, handle)
heartbeat = Heartbeat()
heartbeat.register(rank, TIMEOUT)
os.write(1, b"%d is %d\\n" % (rank, os.getpid()))

def end(code):
    heartbeat.report_exit(code)
    os._exit(code)

def end_on_request():
    while not {{10, 15}} & {{*received}}:
        time.sleep(0.02)
    time.sleep(0.3)
    end(75)

def forever():
    while True:
        time.sleep(60)

"""
# The script of a launcher that starts two workers and passes on the larger exit code.
LAUNCH = """
if len(sys.argv) == 1:
    if DELAY:
        os.write(1, b"the launcher runs\\n")
        time.sleep(DELAY)
    workers = [subprocess.Popen([sys.executable, "-u", __file__, str(k)]) for k in range(2)]
    sys.exit(max(worker.wait() for worker in workers))
rank = int(sys.argv[1])
"""
# The same for the workers of a real launcher.
LAUNCHED = 'rank = int(os.environ.get("RANK") or os.environ["HOROVOD_RANK"])'


@pytest.fixture
def workers(script):
    """Start two workers with a supervisor; returns the supervisor and the ids of the workers."""

    def begin(body="end_on_request()", timeout=60, delay=0, options=(), **seconds):
        head = WORKERS.replace("LAUNCH", LAUNCH.replace("DELAY", str(delay)))
        path = script(head.replace("TIMEOUT", str(timeout)) + body)
        command = command_of(path, *options)
        process = start(with_time_limits(command, **seconds) if seconds else command)
        if delay:
            assert process.stdout.readline() == "the launcher runs\n"
            return process, []
        lines = sorted(process.stdout.readline().split() for _ in range(2))
        return process, [int(line[2]) for line in lines]

    return begin


class TestRequests:
    """Signals ask workers to save and stop; the supervisor passes them on."""

    @pytest.mark.parametrize(
        ("sent", "got"),
        [
            (signal.SIGINT, signal.SIGTERM),
            (signal.SIGTERM, signal.SIGTERM),
            (signal.SIGHUP, signal.SIGTERM),
            (signal.SIGUSR1, signal.SIGUSR1),
        ],
    )
    def test_each_worker_gets_the_signal_once_and_the_launcher_does_not(self, workers, sent, got):
        process, _ = workers(options=("--max-restarts", 3))
        process.send_signal(sent)
        out, err = process.communicate(timeout=20)
        assert sorted(out.splitlines()) == [f"0 got {got:d}", f"1 got {got:d}"]
        assert (process.returncode, err) == (75, "")

    def test_a_request_to_save_and_continue_reaches_the_workers_and_ends_nothing(self, workers):
        process, _ = workers("while not received:\n    time.sleep(0.02)\nend(0)")
        process.send_signal(signal.SIGUSR2)
        out, err = process.communicate(timeout=20)
        assert sorted(out.splitlines()) == ["0 got 12", "1 got 12"]
        assert (process.returncode, err) == (0, "")

    def test_sigusr1_and_2_before_any_worker_has_registered_kill_nobody(self, workers):
        """The first waits for the workers; the second has nothing to save."""
        process, _ = workers(delay=0.5)
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=20)
        received = sorted(line for line in out.splitlines() if " got " in line)
        assert received == ["0 got 10", "1 got 10"]
        assert (process.returncode, err) == (75, "")

    def test_sigterm_after_sigusr1_does_not_cut_the_save_short(self, workers):
        process, _ = workers("while not received:\n    time.sleep(0.02)\ntime.sleep(1)\nend(75)")
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.7)
        process.terminate()
        assert process.wait(10) == 75

    def test_two_jobs_at_once_do_not_affect_each_other(self, workers):
        process, _ = workers()
        other, _ = workers()
        process.terminate()
        assert process.wait(10) == 75
        other.send_signal(signal.SIGUSR1)
        out, _ = other.communicate(timeout=20)
        assert sorted(out.splitlines()) == ["0 got 10", "1 got 10"]

    def test_a_second_request_ends_everything_at_once(self, workers):
        before = marked_processes()
        process, _ = workers("forever()")
        terminate_twice(process)
        assert process.wait(3) == 128 + signal.SIGTERM
        assert marked_processes() <= before

    def test_a_save_that_takes_too_long_is_cut_short(self, workers):
        process, _ = workers("forever()", END_TIMEOUT=0.5)
        process.send_signal(signal.SIGINT)
        start_time = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - start_time > 0.5
        assert (process.returncode, err) == (128 + signal.SIGINT, "")

    def test_a_failure_after_a_request_is_reported_and_not_restarted(self, workers):
        body = "while not received:\n    time.sleep(0.02)\nend(1)"
        process, _ = workers(body, options=("--max-restarts", 3))
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 3
        assert err == "error: the launcher failed with exit code 1; training has stopped\n"


class TestStalls:
    def test_a_stalled_worker_is_named_and_shows_its_stack(self, workers):
        before = marked_processes()
        body = "for k in range(2 - rank):\n    heartbeat.beat(f'training step {k + 1}')\nforever()"
        process, (_, second) = workers(body, timeout=1.5)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 3
        assert err.count("Fatal Python error: Aborted") == err.count(" in forever") == 1
        assert err.splitlines()[-1] == (
            f"error: rank 1 (process {second}) has not gone on for 1.5 s (training step 1); "
            "training has stopped"
        )
        assert marked_processes() <= before

    def test_a_stopped_worker_is_named_and_the_job_started_again(self, workers):
        """It is named although the other worker has fewer beats."""
        body = (
            "if 'CIFAR_RESTARTS' in os.environ:\n    end(0)\n"
            "heartbeat.beat('evaluating')\nif rank == 0:\n    heartbeat.beat('saving')\n"
            "    os.kill(os.getpid(), signal.SIGSTOP)\nforever()"
        )
        process, (first, _) = workers(body, timeout=1, options=("--max-restarts", 1))
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert err == (
            f"rank 0 (process {first}) has not gone on for 1 s (saving, stopped by a signal); "
            "restart 1 of 1 from the newest checkpoint\n"
        )

    def test_all_workers_are_named_when_none_is_behind(self, workers):
        process, _ = workers("heartbeat.beat('step 9')\nforever()", timeout=1.5)
        _, err = process.communicate(timeout=20)
        assert err.count("Aborted") >= 2  # Their lines may be mixed.
        assert err.splitlines()[-1] == (
            "error: none of the 2 ranks has gone on for 1.5 s (step 9); training has stopped"
        )

    def test_an_idle_rank_is_not_stalled(self, workers):
        body = "time.sleep(0.5)\nif rank == 0:\n    heartbeat.beat('wait')\ntime.sleep(1)\nend(0)"
        process, _ = workers(body, timeout=0.5)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 0

    @pytest.mark.slow
    def test_time_in_which_the_supervisor_itself_was_stopped_does_not_count(self, workers):
        """As when the machine or the container was suspended."""
        body = "for k in range(30):\n    heartbeat.beat(f'step {k}')\n    time.sleep(0.1)\nend(0)"
        process, ranks = workers(body, timeout=2.5)
        time.sleep(0.4)  # The workers need some time to send beats.
        for number, then in ((signal.SIGSTOP, 3), (signal.SIGCONT, 0)):
            first, last = ([process.pid], ranks)[:: -1 if number == signal.SIGSTOP else 1]
            for stopped in first:
                os.kill(stopped, number)
            time.sleep(0.4)  # The messages need some time to arrive.
            for stopped in last:
                os.kill(stopped, number)
            time.sleep(then)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode == 0


class TestLaunchersThatDoNotNotice:
    """The launcher of these workers waits for rank 0 first, whatever happens to rank 1."""

    def test_after_a_crash_the_other_workers_get_some_seconds(self, workers):
        body = "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nforever()"
        process, _ = workers(body, CRASH_TIMEOUT=0.5)
        start_time = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - start_time < 10
        assert process.returncode == 3
        assert err.startswith("error: the launcher failed")

    @pytest.mark.slow
    def test_after_a_regular_exit_the_other_workers_get_longer(self, workers):
        body = "if rank == 0:\n    forever()\nend(75)"
        process, _ = workers(body, CRASH_TIMEOUT=0.2, END_TIMEOUT=1)
        start_time = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert 0.8 < time.monotonic() - start_time < 10
        assert process.returncode == 3
        assert err == (
            "error: the launcher has not ended within 1 s of rank 1; training has stopped\n"
        )

    @pytest.mark.parametrize("code", [0, 75])
    def test_after_all_workers_have_ended_their_exit_code_counts(self, script, code):
        hangs = LAUNCH.replace("    sys.exit(", "    time.sleep(60)\n    sys.exit(")
        head = WORKERS.replace("LAUNCH", hangs.replace("DELAY", "0")).replace("TIMEOUT", "60")
        result = run(with_time_limits(command_of(script(head + f"end({code})")), END_TIMEOUT=1))
        assert (result.returncode, result.stderr) == (code, "")


# The script of a worker; its last arguments say what each rank does.
WORKER = """
what = sys.argv[-2:][int(os.environ["RANK"])]
os.write(1, b"ready\\n")
if what.startswith("exit"):
    sys.exit(int(what[4:]))
if what == "raise":
    raise ValueError("boom")
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


class TestWithTorch:
    """The output and the exit code when workers of torch.distributed.launch end."""

    def command(self, path, *what):
        return [sys.executable, SUPERVISOR, "--", *engine_command("dist", 2, str(path)), *what]

    def test_an_exit_code_with_a_meaning_is_passed_on_without_a_line(self, script):
        before = marked_processes()
        result = run(self.command(script(WORKER), "exit2", "exit2"))
        assert (result.returncode, result.stderr) == (2, "")
        assert marked_processes() <= before

    def test_an_exception_is_shown_and_its_rank_is_named_last(self, script):
        result = run(self.command(script(WORKER), "wait", "raise"))
        assert result.returncode == 3
        first, *_, last = result.stderr.splitlines()
        assert first == "Traceback (most recent call last):"
        assert "\nValueError: boom\n" in result.stderr
        assert "torch" not in result.stderr
        assert last == "error: rank 1 failed with exit code 1; training has stopped"

    def test_a_killed_supervisor_leaves_no_process_behind(self, script):
        before = marked_processes()
        process = start(self.command(script(WORKER), "wait", "wait"))
        assert process.stdout.readline() == process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        wait_until(lambda: marked_processes() <= before, seconds=30)

    def test_ctrl_c_at_the_terminal_ends_everything_without_output(self, script):
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


@pytest.fixture
def launched(engine, script):
    """Start two workers as ``workers`` does, with a real launcher that may be restarted once."""
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")

    def begin(body, timeout=60, **seconds):
        head = WORKERS.replace("LAUNCH", LAUNCHED).replace("TIMEOUT", str(timeout))
        command = [sys.executable, SUPERVISOR, *["--tagged"] * (engine == "horovod")]
        command += [
            "--max-restarts",
            "1",
            "--",
            *engine_command(engine, 2, str(script(head + body))),
        ]
        process = start(with_time_limits(command, **seconds))
        lines = sorted(process.stdout.readline().split() for _ in range(2))
        return process, [int(line[2]) for line in lines]

    return begin


ENGINES = ["dist", "horovod"]


class TestWithRealLaunchers:
    @pytest.mark.parametrize(
        "engine", ["dist", pytest.param("horovod", marks=pytest.mark.slow)], indirect=True
    )
    def test_a_killed_worker_is_named_and_the_job_started_again_at_once(self, launched):
        """The other worker does not react, as when it waits for a GPU."""
        before = marked_processes()
        process, (_, second) = launched(
            "if 'CIFAR_RESTARTS' in os.environ:\n    end(0)\nforever()", CRASH_TIMEOUT=0.5
        )
        os.kill(second, signal.SIGKILL)
        start_time = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - start_time < 25
        assert process.returncode == 0
        assert err == (
            "rank 1 was ended by signal 9 (SIGKILL); restart 1 of 1 from the newest checkpoint\n"
        )
        assert marked_processes() <= before

    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_workers_save_and_stop_on_request(self, launched):
        process, _ = launched("end_on_request()")
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert {"0 got 15", "1 got 15"} <= set(out.splitlines())
        assert (process.returncode, err) == (75, "")

    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_one_worker_alone_may_get_the_signal(self, launched):
        """It stops, and the launcher sends SIGTERM to the other worker."""
        process, (_, second) = launched("end_on_request()")
        os.kill(second, signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (75, "")

    @pytest.mark.slow
    @pytest.mark.parametrize("stopped", [False, True])
    @pytest.mark.parametrize("engine", ENGINES, indirect=True)
    def test_a_stall_is_one_line_after_the_stack(self, launched, stopped):
        process, (_, second) = launched(
            "if 'CIFAR_RESTARTS' in os.environ:\n    end(0)\n"
            "for k in range(2 - rank):\n    heartbeat.beat(f'training step {k + 1}')\nforever()",
            timeout=2,
        )
        if stopped:
            time.sleep(0.5)  # The worker needs some time to send its beat.
            os.kill(second, signal.SIGSTOP)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        *stack, last = err.splitlines()
        note = ", stopped by a signal" * stopped
        assert last == (
            f"rank 1 (process {second}) has not gone on for 2 s (training step 1{note}); "
            "restart 1 of 1 from the newest checkpoint"
        )
        assert err.count(" in forever") == (0 if stopped else 1)
        assert len(stack) < 10
        assert "Traceback" not in err
