"""The trace of the steps of a run."""

import json

from utils.distributed.comm import Comm
from utils.metrics.step_times import StepTimes


def test_a_run_that_has_no_step_left_writes_an_empty_trace(tmp_path):
    """As of one that a signal has stopped behind its last step, and that is resumed."""
    StepTimes(keep=True).write(tmp_path / "trace.json", Comm())
    assert json.loads((tmp_path / "trace.json").read_text())["loss"] == []


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    """The disk may be full by now, or the folder gone; the run is trained and saved."""
    path = tmp_path / "gone" / "trace.json"
    StepTimes(keep=True).write(path, Comm())
    said = capsys.readouterr().out
    assert said == f"warning: --trace {path}: cannot be written (No such file or directory)\n"
