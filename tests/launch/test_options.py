"""The launcher's own options, of its help: what is taken, and what is refused in one line."""

import os
import re

import pytest

from helpers.launcher import call
from utils.errors import one_line


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, nothing_starts):
    """No option may make a file where the user stands."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


ELASTIC = ["-f", "horovod", "-n", "1", "--hosts", "localhost:1,127.0.0.1:1"]
# The options with a value: a good one, and what must stand beside it.
LAUNCHER_VALUES = {
    "-m": ("alexnet", []),
    "-n": ("1", []),
    "-g": (None, []),  # good values depend on the machine
    "-d": ("cifar100", []),
    "-f": ("dist", []),
    "--port": ("41235", []),
    "--hosts": ("localhost:1", ["-f", "horovod"]),
    "--network-interfaces": ("lo", ["-f", "horovod"]),
    "--max-restarts": ("1", []),
    "--seeds": ("0-2,7", []),
    "--min-np": ("1", ELASTIC),
    "--max-np": ("1", ELASTIC),
    "--host-discovery-script": (None, ["-f", "horovod"]),  # takes files that are there
}
LAUNCHER_SWITCHES = {
    "--yes",
    "--list",
    "--dry-run",
    "--compare",
    "--verify",
    "--bench",
    "--version",
    "-h",
}

NO_VALUE = [
    "", " ", "*", "?", "[a-z]", "~", '"', "'", "\\", "$(touch marker)", "`touch marker`",
    ";touch marker", "&touch marker", "|touch marker", "${IFS}", "$HOME", "a b", "a\nb", "a\rb",
    "a\x1b[31mb", os.fsdecode(b"\xff\xc3"), "\uff11", "-x", "--", "--dry-run", "0x1", "1e3", "1_0",
    "1" + "0" * 30, "-1", "1.5", ",", ":", "x" * 100_000, "../..", "%s%n", "!!", "{1..9}",
    "-oProxyCommand=touch marker:1", "a:1,-oProxyCommand=touch marker:1", "a:1:1", "localhost",
]  # fmt: skip


def options_of_the_help():
    """Each with the name of its value, or ""."""
    lines = re.findall(r"^  (-.*?)(?:  .*)?$", call("-h").stdout, re.M)
    return dict(
        pair for line in lines for pair in re.findall(r"(-{1,2}[\w-]+)(?: ([A-Z]+))?", line)
    )


def test_the_options_of_the_help_are_known_here():
    shown = options_of_the_help()
    assert {option for option, value in shown.items() if value} <= set(LAUNCHER_VALUES)
    assert {option for option, value in shown.items() if not value} == LAUNCHER_SWITCHES


def refused(words, *named):
    result = call(*words)
    assert (result.returncode, result.stdout) == (2, ""), (words, result)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) <= 420
    for name in named:
        assert name in line, line
    return line


@pytest.fixture(scope="module")
def options():
    """The launcher's options that take a value."""
    return [option for option, value in options_of_the_help().items() if value]


def test_every_bad_value_is_refused(options):
    for option in options:
        for value in NO_VALUE:
            _refuses(option, value)


def _refuses(option, value):
    beside = LAUNCHER_VALUES[option][1]
    start = [] if option == "-m" else ["-m", "alexnet"]
    line = refused([*start, *beside, "--dry-run", option, value], option)
    assert value[:30] in line or one_line(value) in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["-m", "--list"]),
        ([""], ["''"]),
        (["x" * 1000], ["xxx"]),
        (["--dry-run", "-m", "alexnet", "--no-such", "1"], ["--no-such"]),
        (["-m", "alexnet", "-n", "1", "-n", "x", "--dry-run"], ["-n 'x'"]),
        (["-m", "alexnet", "-f", "horovod", "--port", "4000", "--dry-run"], ["--port 4000"]),
        (["-m", "alexnet", "--hosts", "a:1", "--dry-run"], ["--hosts a:1", "horovod"]),
        (["-m", "alexnet", "--dry-run", "--", "a\nb"], ["control character"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "0,2,0"], ["--seeds 0,2,0", "once"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "0-2,1"], ["--seeds 0-2,1", "once"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "3-1"], ["--seeds 3-1"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "0-999999999"], ["--seeds 0-999999999"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "0-1", "--compare"], ["--seeds 0-1"]),
        (["-m", "alexnet", "--dry-run", "--seeds", "0-1", "--port", "4000"], ["--port 4000"]),
    ],
)
def test_what_cannot_be_started(words, named):
    refused(words, *named)


def test_good_values_are_taken_and_the_last_one_wins(options):
    """The positive control; the last of two values wins."""
    for option in options:
        good, beside = LAUNCHER_VALUES[option]
        if good is None:
            continue
        start = [] if option == "-m" else ["-m", "vgg11"]
        result = call(*start, *beside, "--dry-run", option, "*", option, good)
        assert (result.returncode, result.stderr) == (0, ""), option
