"""What a checkpoint tells of the starts that have led to it."""

import copy

import pytest

from utils.checkpoint import manager
from utils.checkpoint.format import LATEST, load
from utils.checkpoint.resume import LoadedCheckpoint, earlier_starts
from utils.runtime.provenance import STARTS

HERE = {
    "images": [1, 2, 3, 4], "memory_format": "contiguous", "engine": "gloo", "workers": 2,
    "versions": {"torch": "2.15"}, "git_commit": "abc", "machine": {"cores": 2},
}  # fmt: skip


def start(lr=0.1, start_epoch=None, resume=None, **changes):
    options = {"lr": lr, "start_epoch": start_epoch, "resume": resume}
    return copy.deepcopy({"options": options, **HERE, **changes})


@pytest.fixture
def after(tmp_path):
    """What the present start's checkpoints say of those before the file that it goes on from."""

    def earlier(now, one, *before, own=False):
        content = {"epoch": 3, "state_dict": {}, **one, "earlier": list(before)}
        return earlier_starts(LoadedCheckpoint(tmp_path / "file.pth", content, own=own), now)

    return earlier


def test_a_run_that_goes_on_as_it_was_has_no_earlier_starts(after):
    assert earlier_starts(None, start()) == []
    assert after(start(resume="auto"), start()) == []  # The flag changes no number.


def test_each_other_way_or_place_is_kept_once_and_in_order(after):
    there = start(git_commit="def", workers=3)
    fast = start(lr=0.2)
    assert after(there, start()) == [start()]
    assert after(fast, there, start()) == [start(), there]
    # Back where it began: between two places the list does not grow.
    assert after(start(), there, start()) == [there]
    assert after(there, start(), there) == [start()]


FILE = {"options": {}, "file": "file.pth"}


def test_a_file_that_is_no_checkpoint_of_a_run_is_kept_by_its_name(after):
    assert after(start(), {}) == [FILE]
    assert after(start(), start(), FILE) == [FILE]


def test_a_start_at_another_epoch_begins_with_the_weights_of_a_file(after):
    """It stays so when the run goes on, unless it was only started again by its launcher."""
    again = start(start_epoch=0)
    assert after(again, start()) == [start(), FILE]
    assert after(start(), again, start(), FILE) == [FILE, again]
    assert after(again, again, own=True) == []
    assert after(again, again) == [FILE]


def test_a_checkpoint_of_an_older_version_does_not_know_where_it_was_written(after):
    old = {"options": start()["options"], "workers": 2}
    (unknown,) = after(start(), old)
    assert unknown == {**dict.fromkeys(STARTS), **old}


@pytest.mark.parametrize(
    "nonsense", [3, [3], None, [{"options": 3}], [{"options": {"lr": {1}}}], [[]]]
)
def test_nonsense_is_carried_on_as_something_that_can_be_read(tmp_path, nonsense):
    loaded = LoadedCheckpoint(tmp_path / "file.pth", {**start(), "earlier": nonsense})
    found = earlier_starts(loaded, start())
    assert all(isinstance(one["options"], dict) for one in found)
    manager.save(tmp_path, {"format": 2, "state_dict": {}, "earlier": found}, is_best=False)
    assert load(tmp_path / LATEST)["earlier"] == found


def test_a_list_within_itself_is_nonsense_too(after):
    endless = start()
    endless["options"]["lr"] = [endless]
    assert after(start(), endless) == [FILE]
