"""What a command prints where the terminal is narrow, or nobody reads."""

import sys

import pytest

from helpers.process import environment

COMMAND = """
from utils.errors import command

@command
def main():
    for _ in range({lines}):
        print("\\N{{CJK UNIFIED IDEOGRAPH-732B}}", "x" * 99)
    return 0

raise SystemExit(main())
"""
LOG = """
from utils import log

log.open_streams()
log.info("\\N{CJK UNIFIED IDEOGRAPH-732B}")
"""


@pytest.mark.parametrize("code", [COMMAND.format(lines=1), LOG], ids=["command", "log"])
def test_a_terminal_that_lacks_a_character_ends_nothing(run, code):
    result = run([sys.executable, "-c", code], env=environment(PYTHONIOENCODING="latin-1"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\u732b")


def test_a_reader_that_goes_away_ends_a_command_in_silence(run):
    pipe = """set -o pipefail; "$0" -c "$1" | head -n 1 >/dev/null; echo "${PIPESTATUS[0]}" """
    result = run(["bash", "-c", pipe, sys.executable, COMMAND.format(lines=99999)])
    assert (result.stdout, result.stderr) == ("141\n", "")
