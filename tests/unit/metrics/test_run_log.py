"""log.txt, its curves, and the trace of a run."""

import json
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.metrics import plot
from utils.metrics.meter import Metrics
from utils.metrics.plot import draw, read_log, run_names
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
            log = RunLog(tmp_path, 2)
            assert "cannot be written (No space left on device)" in capsys.readouterr().out
            log = RunLog(tmp_path, 1)  # It has its rows until an epoch is trained anew.
            assert capsys.readouterr().out == ""
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

    def test_events_that_cannot_be_written_are_a_warning(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        log = RunLog(tmp_path, 0, tensorboard=True)
        row = Metrics(1.0, 77.0, 90.0, 1000)
        for epoch in (1, 2):
            log.epoch(epoch, 0.1, row, row, seconds=2.0)
        log.close()
        assert capsys.readouterr().out.count("warning: the events of TensorBoard in ") == 1
        assert len((tmp_path / "log.txt").read_text().splitlines()) == 3

    def test_a_resumed_run_keeps_the_events_of_its_last_epoch(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        row = Metrics(1.0, 77.0, 90.0, 1000)
        for done, last in ((0, 3), (2, 3)):
            log = RunLog(tmp_path, done, tensorboard=True)
            for epoch in range(done + 1, last + 1):
                log.epoch(epoch, 0.1, row, row, seconds=2.0)
            log.close()
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [event.step for event in events.Scalars("valid/loss")] == [1, 2, 3]

    @pytest.mark.parametrize("loss", [2.0, float("nan")])
    def test_going_back_leaves_each_epoch_once(self, tmp_path, capsys, loss):
        """In a log that begins with epoch 3, also where all rows are the same."""
        row = Metrics(loss, 50.0, 90.0, 1000)
        for done, last in ((2, 6), (4, 6), (5, 6), (6, 6)):
            log = RunLog(tmp_path, done)
            for epoch in range(done + 1, last + 1):
                log.epoch(epoch, 0.1, row, row, seconds=2.0)
            assert epochs(tmp_path) == [3, 4, 5, 6]
            assert len((tmp_path / "log.txt").read_text().splitlines()) == 1 + 4
        assert capsys.readouterr().out == ""

    def test_of_an_epoch_that_an_older_version_has_left_twice_the_last_stays(self, tmp_path):
        self.write(tmp_path, 2, 5)
        wanted = (tmp_path / "log.txt").read_text()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        header, *rows = wanted.splitlines(keepends=True)
        old = lines[1].replace("50.", "10.").replace("53.", "13.")
        assert old != lines[1]
        (tmp_path / "metrics.jsonl").write_text("".join([lines[0], old, *lines[1:]]))
        (tmp_path / "log.txt").write_text("".join([header, rows[0], rows[1], *rows[1:]]))
        RunLog(tmp_path, 5)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
        assert (tmp_path / "log.txt").read_text() == wanted

    def test_the_rows_of_an_older_script_are_counted_and_stay_as_they_are(self, tmp_path, capsys):
        header = "\t".join(LOG_COLUMNS) + "\t\n"
        rows = [f"0.100000\t2.{epoch}\t2.0\t50.0\t50.0\t\n" for epoch in (1, 2, 3)]
        (tmp_path / "log.txt").write_text(header + "".join(rows))
        self.write(tmp_path, 2, 4)
        self.write(tmp_path, 3, 4)
        lines = (tmp_path / "log.txt").read_text().splitlines(keepends=True)
        assert lines[:3] == [header, *rows[:2]]
        assert len(lines) == 1 + 4
        assert epochs(tmp_path) == [3, 4]
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("name", "damage"),
        [
            ("log.txt", lambda text: text[:60] + b"\xff" + text[61:]),
            ("log.txt", lambda text: text.replace(b"Train", b"Tr\xffin", 1)),
            ("log.txt", lambda text: text.replace(b"\n0.1", b"\n# a note\n0.1", 1)),
            ("log.txt", lambda text: text[:-20]),
            ("log.txt", None),
            ("metrics.jsonl", lambda text: text.replace(b"}\n", b"\n", 1)),
            ("metrics.jsonl", lambda text: b"[1]\n\xff\n" + text),
            ("metrics.jsonl", lambda text: b'{"epoch": 1, "learning_rate": 1' + b"0" * 400 + b"}"),
            ("metrics.jsonl", None),
        ],
    )
    def test_a_damaged_log_is_put_aside_and_goes_on(self, tmp_path, capsys, name, damage):
        self.write(tmp_path, 0, 4)
        path, wanted = tmp_path / name, (tmp_path / "log.txt").read_text()
        kept = path.with_name(name.replace(".", ".damaged."))
        for turn in (kept, kept.with_stem(f"{kept.stem}-2")):
            if damage:
                damaged = damage(path.read_bytes())
                path.write_bytes(damaged)
            else:  # It cannot be read, also by root.
                path.unlink()
                path.mkdir()
            self.write(tmp_path, 3, 4)
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith(f"warning: {path}: ")
            assert f"; it is kept as {turn.name}, " in line
            assert (turn.read_bytes() == damaged) if damage else turn.is_dir()
            assert (tmp_path / "log.txt").read_text() == wanted
            found = epochs(tmp_path)
            assert found == sorted(set(found))
            assert found[-1] == 4
            self.write(tmp_path, 0, 4)

    def test_a_log_with_other_columns_is_put_aside(self, tmp_path, capsys):
        text = "\t".join([*LOG_COLUMNS, "Time"]) + "\n0.1\t2.0\t2.0\t50.0\t50.0\t7\n"
        (tmp_path / "log.txt").write_text(text)
        self.write(tmp_path, 1, 3)
        assert (tmp_path / "log.before.txt").read_text() == text
        assert len(read_log(tmp_path / "log.txt")["Valid Loss"]) == 2
        (line,) = capsys.readouterr().out.splitlines()
        assert "it is kept as log.before.txt" in line

    def test_curves_of_several_runs_are_drawn_over_each_other(self, tmp_path, monkeypatch, capsys):
        """Those of one name too, and those that begin with _."""
        from matplotlib.figure import Figure

        names = ("cifar10/resnet20", "cifar100/resnet20", "_old", "$x_1$")
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            self.write(tmp_path / name, 0, 3)
        logs = [str(tmp_path / name / "log.txt") for name in names]
        labels = []

        def savefig(figure, file, **_):
            labels.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
            file.write(b"a picture")

        monkeypatch.setattr(Figure, "savefig", savefig)
        picture = tmp_path / "new" / "compare.png"
        monkeypatch.setattr("sys.argv", ["plot", *logs, logs[0], "-o", str(picture)])
        assert plot.main() == 0
        assert picture.read_bytes() == b"a picture"
        wanted = [f"{name} {part}" for name in names for part in ("train", "valid")]
        assert [label.strip() for label in labels] == wanted
        assert not any(label.startswith("_") for label in labels)
        note, line = capsys.readouterr().out.splitlines()
        assert note == f"note: {logs[0]}: is {logs[0]}, which is drawn once"
        assert line == str(picture)

    def test_the_plotter_says_in_a_line_what_is_wrong(self, tmp_path, monkeypatch, capsys):
        self.write(tmp_path, 0, 1)
        good, bad = str(tmp_path / "log.txt"), str(tmp_path / "bad.txt")
        (tmp_path / "bad.txt").write_bytes(b"\xff")
        for words, said in (
            ([bad], f"error: {bad}: not a log.txt of a run: "),
            ([good, bad + "x"], f"error: {bad}x: not a log.txt of a run: No such file"),
            ([good, "-o", str(tmp_path)], f"error: -o {tmp_path}: cannot be drawn (Is a dir"),
            ([good, "-o", f"{good}/x.png"], f"error: -o {good}: cannot be written to ("),
        ):
            monkeypatch.setattr("sys.argv", ["plot", *words])
            assert plot.main() == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(said)

    def test_an_empty_log_can_be_drawn_and_another_file_is_refused(self, tmp_path):
        self.write(tmp_path, 0, 0)
        draw({"run": read_log(tmp_path / "log.txt")}, tmp_path / "log.png")
        (tmp_path / "other.txt").write_text("a b c\n1\n")
        with pytest.raises(UserError, match=r"other\.txt"):
            read_log(tmp_path / "other.txt")


def epochs(folder):
    return [json.loads(x)["epoch"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("logs", "names"),
    [
        ("runs/a/log.txt runs/b/log.txt", "a b"),
        ("x/a/log.txt y/a/log.txt y/b/log.txt", "x/a y/a b"),
        ("x/a/b/log.txt y/a/b/log.txt a/b/log.txt", "x/a/b y/a/b {here}/a/b"),
        ("x/log.txt x/old.txt y/log.txt", "x/log.txt old.txt y/log.txt"),
        ("/log.txt /a/log.txt", "/ a"),
    ],
)
def test_runs_get_the_shortest_names_that_differ(monkeypatch, tmp_path, logs, names):
    monkeypatch.chdir(tmp_path)
    assert run_names([Path(x) for x in logs.split()]) == names.format(here=tmp_path.name).split()
