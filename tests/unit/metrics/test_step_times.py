"""The trace of the steps of a run."""

import json

from utils.distributed.comm import Comm
from utils.metrics.step_times import StepTimes


def test_a_run_that_has_no_step_left_writes_an_empty_trace(tmp_path):
    """As of one that a signal has stopped behind its last step, and that is resumed."""
    StepTimes(keep=True).write(tmp_path / "trace.json", Comm())
    assert json.loads((tmp_path / "trace.json").read_text())["loss"] == []
