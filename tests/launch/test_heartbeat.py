"""utils/launch/heartbeat.py: a supervisor learns about its workers, and from nobody else."""

import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest

from helpers.process import environment, run, wait_until
from utils.files import ROOT
from utils.launch.heartbeat import SERVER_VARIABLE, HeartbeatServer


@pytest.fixture
def server():
    with closing(HeartbeatServer()) as server:
        yield server


def worker_command(body):
    """The command of a process that executes a body, in which h is a Heartbeat."""
    imports = "import os, sys, time\nfrom utils.launch import heartbeat\n"
    return [sys.executable, "-c", f"{imports}h = heartbeat.Heartbeat()\n{body}"]


@contextmanager
def worker(server, body):
    """A process that executes a body and lives until its standard input is closed."""
    process = subprocess.Popen(
        worker_command(
            f"{body}\nsys.stdout.write('done\\n'); sys.stdout.flush(); sys.stdin.read()"
        ),
        env=environment(**{SERVER_VARIABLE: server.name}),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "done\n"
        server.poll()
        yield process


def test_a_registered_rank_is_known_with_its_process_id(server):
    with worker(server, "h.register(3, 2.5)") as process:
        (seen,) = server.workers
        assert (seen.rank, seen.pid, seen.timeout) == (3, process.pid, 2.5)
        assert seen.activity == ""
    wait_until(lambda: server.poll() or seen.ended_at)
    assert server.living() == []


def test_the_last_of_several_beats_counts(server):
    with worker(server, "h.register(0, 1)\nfor k in range(5): h.beat(f'step {k}')"):
        (seen,) = server.workers
        assert (seen.beats, seen.activity) == (5, "step 4")


def test_a_rank_reports_its_exit_code(server):
    with worker(server, "h.register(0, 1)\nh.beat('step 1')\nh.report_exit(75)"):
        assert server.workers[0].exit_code == 75


def test_ten_thousand_unread_beats_block_nobody_and_idle_arrives(server):
    body = "h.register(0, 1)\nfor _ in range(10_000): h.beat('step')"
    body += "\nfrom threading import Timer\nTimer(0.3, os.write, (1, b'done\\n')).start()"
    body += "\nh.idle()\nsys.stdin.read()\nos._exit(0)"
    with worker(server, body):
        (seen,) = server.workers
        assert 100 < seen.beats <= 10_000
        wait_until(lambda: server.poll() or seen.activity == "")
        assert seen.beats == 10_000


class TestStall:
    def test_is_found_after_the_longest_timeout_and_names_the_ranks_behind(self, server):
        with (
            worker(server, "h.register(0, 0.1)\nh.beat('step 1')\nh.beat('step 2')"),
            worker(server, "h.register(1, 0.6)\nh.beat('step 1')"),
        ):
            server.poll()
            time.sleep(0.3)
            server.poll()
            assert server.stalled() == []
            time.sleep(0.4)
            server.poll()
            assert [(rank.rank, rank.activity) for rank in server.stalled()] == [(1, "step 1")]

    @pytest.mark.parametrize("body", ["", "h.beat('step 1')\nh.idle()"])
    def test_is_none_while_a_rank_is_idle(self, server, body):
        with (
            worker(server, "h.register(0, 0.1)\nh.beat('step 1')"),
            worker(server, f"h.register(1, 0.1)\n{body}"),
        ):
            time.sleep(0.3)
            server.poll()
            assert server.stalled() == []


class TestOtherProcesses:
    """The names of abstract sockets are public: any process of the machine may connect."""

    @pytest.mark.parametrize(
        "messages",
        [
            [b"1 step"],
            [b"hello"],
            [b"hello 1"],
            [b"hello -1 5"],
            [b"hello 1 nan"],
            [b"hello 1 5 5"],
            [b"hello " + b"1" * 2000 + b" 5"],
            [b"leave 0", b"\0\xff", b"x" * 100_000],
        ],
    )
    def test_invalid_messages_are_ignored(self, server, messages):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{server.name}")
            for message in messages:
                connection.send(message)
            server.poll()
        server.poll()
        assert server.workers == []

    def test_only_printable_text_is_accepted(self, server):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{server.name}")
            for message in (b"hello 0 1", b"1 step", b"2 \x1b[31m", b"two\nlines", b"\xc3\xa9"):
                connection.send(message)
                server.poll()
            (seen,) = server.workers
            assert (seen.beats, seen.activity) == (1, "step")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
    def test_other_users_are_ignored(self, server):
        with worker(server, "os.setuid(65534)\nh.register(0, 1)\nh.beat('step 1')"):
            assert server.workers == []

    def test_a_name_is_not_used_twice(self, server):
        with closing(HeartbeatServer()) as other:
            assert other.name != server.name
        assert len(server.name) == 32


class TestWithoutSupervisor:
    @pytest.mark.parametrize("name", [None, "nobody-listens-here"])
    def test_a_stalled_rank_shows_its_stack_and_ends(self, name):
        env = environment(**({SERVER_VARIABLE: name} if name else {}))
        body = (
            "heartbeat._EXTRA_WAIT = 0.2\nh.register(0, 0.3)\n"
            "def forever():\n    time.sleep(60)\n"
            "h.beat('a')\nh.idle()\ntime.sleep(0.8)\nh.beat('b')\nprint('alive', flush=True)\n"
            "forever()"
        )
        result = run(worker_command(body), env=env, timeout=20)
        assert result.stdout == "alive\n"
        assert result.returncode == 1
        assert "in forever" in result.stderr

    def test_a_rank_that_continues_or_reports_its_exit_lives(self):
        body = (
            "heartbeat._EXTRA_WAIT = 0\nh.register(0, 1.3)\n"
            "for k in range(9):\n    h.beat('step')\n    time.sleep(0.2)\n"
            "h.report_exit(0)\ntime.sleep(1.5)"
        )
        result = run(worker_command(body), env=environment(), timeout=20)
        assert (result.returncode, result.stderr) == (0, "")

    def test_a_timeout_may_be_infinite(self):
        body = "h.register(0, float('inf'))\nh.beat('step')"
        result = run(worker_command(body), timeout=20)
        assert (result.returncode, result.stderr) == (0, "")
