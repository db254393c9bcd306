"""Files of accidents and of attackers: refused in one line or read, and nothing else happens.

Each case must end in a UserError or in data, within a time limit, without a crash, a file, or code
that runs; fuzzing.py reads them in a process of its own.
"""

import json
import sys

import pytest

from helpers.process import environment, run
from utils.files import ROOT

PROGRAM = ROOT / "tests" / "helpers" / "fuzzing.py"


def read_cases(kind, first, count, folder, timeout):
    """What reading these cases came to; fails with the case that broke the reader."""
    command = [sys.executable, "-W", "ignore", PROGRAM, kind, first, count, folder]
    result = run(command, env=environment(), cwd=folder, timeout=timeout)
    case = folder / "case"
    number = case.read_text() if case.exists() else "none"
    assert result.returncode == 0, f"{kind}, case {number}: {result.returncode}\n{result.stderr}"
    assert list(folder.iterdir()) == [case], "a file was written"
    report = json.loads(result.stdout.splitlines()[-1])
    print(kind, report)
    assert report["peak_MiB"] < 2000
    assert report["damaged"]["changed"] == [], "a digest would have told"
    return report


@pytest.mark.parametrize("kind", ["archives", "checkpoints", "weights"])
def test_damaged_and_hostile_files_do_no_harm(kind, tmp_path):
    report = read_cases(kind, 0, 150, tmp_path, timeout=100)
    assert report["damaged"]["refused"] > 50
    assert report["damaged"]["loaded"] > 0, "no damage is as light as some accidents"
    for cases in (report["hostile"], report.get("forced", report["hostile"])):
        assert cases["refused"] > 0.9 * cases["cases"], "the others are of no danger"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["archives", "checkpoints", "weights"])
def test_thousands_of_damaged_files_do_no_harm(kind, tmp_path):
    report = read_cases(kind, 1000, 5000, tmp_path, timeout=800)
    assert report["damaged"]["cases"] == 5000
