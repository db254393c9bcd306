"""log.txt, its curves, and the trace of a run."""

import json
import subprocess
import sys

import pytest

from utils.errors import UserError
from utils.metrics.meter import Metrics
from utils.metrics.plot import draw, read_log
from utils.metrics.run_log import LOG_COLUMNS, RunLog


class TestRunLog:
    def write(self, folder, first, last):
        log = RunLog(folder, first)
        for epoch in range(first, last):
            train = Metrics(2.0 / (epoch + 1), 50.0 + epoch, 90.0, 1000)
            log.epoch(epoch + 1, 0.1, train, train, seconds=2.0)
        log.close()

    def test_a_row_an_epoch_in_the_familiar_format(self, tmp_path):
        self.write(tmp_path, 0, 3)
        lines = (tmp_path / "log.txt").read_text().splitlines()
        assert lines[0].split("\t") == list(LOG_COLUMNS)
        assert lines[1] == "0.100000\t2.000000\t2.000000\t50.000000\t50.000000"
        records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [r["epoch"] for r in records] == [1, 2, 3]
        assert records[0]["images_per_second"] == 500.0

    def test_resuming_cuts_off_the_epochs_that_are_trained_again(self, tmp_path):
        self.write(tmp_path, 0, 5)
        untouched = (tmp_path / "log.txt").read_text()
        self.write(tmp_path, 2, 5)
        assert (tmp_path / "log.txt").read_text() == untouched
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5

    def test_a_disk_that_is_full_at_the_start_costs_rows_until_there_is_room(
        self, tmp_path, monkeypatch, capsys
    ):
        self.write(tmp_path, 0, 2)
        before = (tmp_path / "log.txt").read_text()

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("utils.metrics.run_log.write_text", full)
            log = RunLog(tmp_path, 1)
        assert "cannot be written (No space left on device)" in capsys.readouterr().out
        assert (tmp_path / "log.txt").read_text() == before
        row = Metrics(1.0, 77.0, 90.0, 1000)
        log.epoch(2, 0.1, row, row, seconds=2.0)
        lines = (tmp_path / "log.txt").read_text().splitlines()
        assert lines[:2] == before.splitlines()[:2]
        assert lines[2:] == ["0.100000\t1.000000\t1.000000\t77.000000\t77.000000"]

    def test_a_log_that_cannot_be_written_costs_no_events(self, tmp_path, monkeypatch, capsys):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def full(*_):
            raise OSError(28, "No space left on device")

        log = RunLog(tmp_path, 0, tensorboard=True)
        row = Metrics(1.0, 77.0, 90.0, 1000)
        with monkeypatch.context() as patch:
            patch.setattr("utils.metrics.run_log.write_text", full)
            log.epoch(1, 0.1, row, row, seconds=2.0)
        log.epoch(2, 0.1, row, row, seconds=2.0)
        log.close()
        assert capsys.readouterr().out.count("cannot be written") == 1
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [event.step for event in events.Scalars("valid/loss")] == [1, 2]

    def test_curves_of_several_runs_are_drawn_over_each_other(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            self.write(tmp_path / name, 0, 3)
        logs = [str(tmp_path / name / "log.txt") for name in ("a", "b")]
        picture = tmp_path / "compare.png"
        command = [sys.executable, "-m", "utils.plot", *logs, "-o", str(picture)]
        subprocess.run(command, check=True, timeout=60)
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_an_empty_log_can_be_drawn_and_another_file_is_refused(self, tmp_path):
        self.write(tmp_path, 0, 0)
        draw({"run": read_log(tmp_path / "log.txt")}, tmp_path / "log.png")
        (tmp_path / "other.txt").write_text("a b c\n1\n")
        with pytest.raises(UserError, match=r"other\.txt"):
            read_log(tmp_path / "other.txt")
