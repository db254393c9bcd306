"""A job that is started again does what it was asked for, wherever it was killed before."""

import os
import shutil
import sys

import pytest
import torch

from utils import log
from utils.checkpoint import manager
from utils.checkpoint.format import BEST, LATEST, PREVIOUS, load, load_newest
from utils.checkpoint.resume import find_checkpoint
from utils.checkpoint.run_dir import claim_run_dir
from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.runtime.provenance import STARTS

KILLED, REFUSED = 9, 2
# How far every run in here has come.
COME = {"epoch": 1, "acc": 50.0, "best_acc": 50.0, "best_epoch": 1}
# What the kernel is asked to change, by the names of Python's audit events.
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.link", "open"}


class Started(Comm):
    """The serial engine of a job that is started for the first time, or again."""

    def __init__(self, job, again):
        super().__init__()
        self.job, self._again = job, again

    def may_be_restarted(self):
        return self._again


def save(folder, job):
    weights = {"w": torch.zeros(1)}
    manager.save(folder, {"format": 2, "state_dict": weights, "job": job, **COME}, is_best=True)


def train(folder, flags, job, again):
    """Claim the folder, save twice, and return whose checkpoint the job goes on from."""
    run, comm = parse_args(["-c", str(folder), *flags]).run, Started(job, again)
    loaded = find_checkpoint(run, folder, comm)
    assert loaded is None or loaded.own == (loaded.content["job"] == job)
    about = {**dict.fromkeys(STARTS), "machine": {}, "earlier": [], "job": job}
    with claim_run_dir(folder, run, loaded, TrainState(**COME), about, comm):
        assert loaded or not any((folder / name).exists() for name in (LATEST, PREVIOUS, BEST))
        (folder / "log.txt").write_text("header\nrow\n")
        save(folder, job)
        save(folder, job)
    return loaded.content["job"] if loaded else None


def train_until_killed(folder, flags, change):
    """The same in a child, killed before its change of that number; return how it has ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = change

    def count(event, arguments):
        nonlocal left
        if event in CHANGES and (event != "open" or (arguments[2] or 0) & os.O_CREAT):
            left -= 1
            if left < 0:
                os._exit(KILLED)

    try:
        sys.addaudithook(count)
        train(folder, flags, "mine", again=False)
    except UserError:
        os._exit(REFUSED)
    except BaseException:
        os._exit(1)
    os._exit(0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.parametrize(
    ("holds", "flags", "begins_with"),
    [
        ("old", ["--overwrite"], None),
        ("old", [], REFUSED),
        ("old", ["--resume", "auto"], "old"),
        ("old", ["--resume", f"run/{BEST}"], "old"),
        ("old", ["--resume", "other/weights.pth"], REFUSED),
        ("nothing", [], None),
        ("nothing", ["--overwrite"], None),
        ("nothing", ["--resume", "auto"], None),
        ("nothing", ["--resume", "other/weights.pth"], "other"),
        ("damaged", ["--overwrite"], None),
        ("damaged", [], REFUSED),
        ("damaged", ["--resume", f"run/{BEST}"], "old"),
    ],
)
def test_a_job_killed_between_two_changes_does_what_its_flags_say(
    tmp_path, monkeypatch, holds, flags, begins_with
):
    """Until it has saved, when it goes on from there; the old run goes only by --overwrite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "warning", lambda _: None)
    before, other, folder = (tmp_path / name for name in ("before", "other", "run"))
    other.mkdir()
    save(other, "other")
    (other / LATEST).rename(other / "weights.pth")
    if holds == "nothing":
        before.mkdir()
    else:
        train(before, [], "old", again=False)
        for name in (LATEST, PREVIOUS) if holds == "damaged" else ():
            (before / name).unlink()  # It may be one file with the best.
            (before / name).write_bytes(b"half")
    for change in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        code = train_until_killed(folder, flags, change)
        if code != KILLED:
            assert code == (REFUSED if begins_with == REFUSED else 0)
            break
        try:
            newest = load_newest(folder, trust=False)
        except UserError:
            newest = None
        saved = newest is not None and newest[2]["job"] == "mine"
        if begins_with == REFUSED:
            assert contents(folder) == contents(before)
            with pytest.raises(UserError, match="holds a run already"):
                train(folder, flags, "mine", again=True)
            assert contents(folder) == contents(before)
        else:
            if f"run/{BEST}" in flags:  # It is replaced before the newest one.
                saved = saved or load(folder / BEST)["job"] == "mine"
            assert train(folder, flags, "mine", again=True) == ("mine" if saved else begins_with)
            assert load(folder / PREVIOUS)["job"] == "mine"
    assert change > (1 if begins_with == REFUSED else 20)


def test_what_a_job_has_saved_is_not_thrown_away_where_all_of_it_is_damaged(tmp_path):
    folder = tmp_path / "run"
    train(folder, [], "mine", again=False)
    for name in (LATEST, PREVIOUS):
        (folder / name).unlink()
        (folder / name).write_bytes(b"half")
    with pytest.raises(UserError, match="holds a run already"):
        train(folder, [], "mine", again=True)
    assert train(folder, ["--overwrite"], "mine", again=True) is None
