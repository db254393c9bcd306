"""utils/launch/heartbeat.py: what a supervisor learns from its workers, and from nobody else."""

import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest
from conftest import ROOT, environment, run, wait_until

from utils.launch.heartbeat import VARIABLE, Listener


@pytest.fixture
def listener():
    with closing(Listener()) as listener:
        yield listener


def words(body):
    """The command of a worker: what it does line by line, with a Watch at hand."""
    return [
        sys.executable,
        "-c",
        f"import os, sys, time\nfrom utils.launch.heartbeat import Watch\n{body}",
    ]


@contextmanager
def worker(listener, body):
    """A process that does the body and lives until its standard input is closed."""
    process = subprocess.Popen(
        words(f"{body}\nsys.stdout.write('done\\n'); sys.stdout.flush(); sys.stdin.read()"),
        env=environment(**{VARIABLE: listener.name}),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "done\n"
        listener.look()
        yield process


def test_a_rank_is_known_by_what_it_says_and_by_its_process(listener):
    with worker(listener, "w = Watch()\nw.begin(3, 2.5)") as process:
        (seen,) = listener.workers
        assert (seen.rank, seen.process, seen.timeout) == (3, process.pid, 2.5)
        assert seen.what == ""
    wait_until(lambda: listener.look() or seen.ended)
    assert listener.living() == []


def test_the_last_of_several_beats_counts(listener):
    with worker(listener, "w = Watch()\nw.begin(0, 1)\nfor k in range(5): w.beat(f'step {k}')"):
        (seen,) = listener.workers
        assert (seen.count, seen.what) == (5, "step 4")


def test_who_leaves_says_with_which_code(listener):
    with worker(listener, "w = Watch()\nw.begin(0, 1)\nw.beat('step 1')\nw.leave(75)"):
        assert listener.workers[0].code == 75


def test_ten_thousand_beats_unread_hold_up_nobody_and_what_must_arrive_does(listener):
    body = "w = Watch()\nw.begin(0, 1)\nfor _ in range(10_000): w.beat('step')"
    body += "\nfrom threading import Timer\nTimer(0.3, os.write, (1, b'done\\n')).start()"
    body += "\nw.idle()\nsys.stdin.read()\nos._exit(0)"
    with worker(listener, body):
        (seen,) = listener.workers
        assert 100 < seen.count <= 10_000
        wait_until(lambda: listener.look() or seen.what == "")
        assert seen.count == 10_000


class TestStall:
    def test_is_found_after_the_longest_timeout_and_has_the_least_advanced_ranks(self, listener):
        with (
            worker(listener, "w = Watch()\nw.begin(0, 0.1)\nw.beat('step 1')\nw.beat('step 2')"),
            worker(listener, "w = Watch()\nw.begin(1, 0.6)\nw.beat('step 1')"),
        ):
            listener.look()
            time.sleep(0.3)
            listener.look()
            assert listener.stalled() == []
            time.sleep(0.4)
            listener.look()
            assert [(w.rank, w.what) for w in listener.stalled()] == [(1, "step 1")]

    @pytest.mark.parametrize("body", ["", "w.beat('step 1')\nw.idle()"])
    def test_is_none_while_a_rank_is_idle(self, listener, body):
        with (
            worker(listener, "w = Watch()\nw.begin(0, 0.1)\nw.beat('step 1')"),
            worker(listener, f"w = Watch()\nw.begin(1, 0.1)\n{body}"),
        ):
            time.sleep(0.3)
            listener.look()
            assert listener.stalled() == []


class TestStrangers:
    """The names of such sockets are public: everybody on the machine may connect."""

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
    def test_nonsense_is_ignored(self, listener, messages):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{listener.name}")
            for message in messages:
                connection.send(message)
            listener.look()
        listener.look()
        assert listener.workers == []

    def test_nothing_but_printable_text_reaches_the_screen(self, listener):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{listener.name}")
            for message in (b"hello 0 1", b"1 step", b"2 \x1b[31m", b"two\nlines", b"\xc3\xa9"):
                connection.send(message)
                listener.look()
            (seen,) = listener.workers
            assert (seen.count, seen.what) == (1, "step")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
    def test_other_users_are_not_heard(self, listener):
        with worker(listener, "os.setuid(65534)\nw = Watch()\nw.begin(0, 1)\nw.beat('step 1')"):
            assert listener.workers == []

    def test_a_name_is_not_used_twice(self, listener):
        with closing(Listener()) as other:
            assert other.name != listener.name
        assert len(listener.name) == 32


class TestWithoutSupervisor:
    @pytest.mark.parametrize("name", [None, "nobody-listens-here"])
    def test_a_rank_that_stands_still_shows_its_stack_and_ends(self, name):
        env = environment(**({VARIABLE: name} if name else {}))
        body = (
            "import utils.launch.heartbeat\nutils.launch.heartbeat._LATER = 0.2\nw = Watch()\nw.begin(0, 0.3)\n"
            "def forever():\n    time.sleep(60)\n"
            "w.beat('a')\nw.idle()\ntime.sleep(0.8)\nw.beat('b')\nprint('alive', flush=True)\n"
            "forever()"
        )
        result = run(words(body), env=env, timeout=20)
        assert result.stdout == "alive\n"
        assert result.returncode == 1
        assert "in forever" in result.stderr

    def test_a_rank_that_goes_on_or_leaves_is_left_alone(self):
        body = (
            "import utils.launch.heartbeat\nutils.launch.heartbeat._LATER = 0\nw = Watch()\nw.begin(0, 1.3)\n"
            "for k in range(9):\n    w.beat('step')\n    time.sleep(0.2)\n"
            "w.leave(0)\ntime.sleep(1.5)"
        )
        result = run(words(body), env=environment(), timeout=20)
        assert (result.returncode, result.stderr) == (0, "")

    def test_a_timeout_may_be_infinite(self):
        result = run(words("w = Watch()\nw.begin(0, float('inf'))\nw.beat('step')"), timeout=20)
        assert (result.returncode, result.stderr) == (0, "")
