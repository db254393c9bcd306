"""What a checkpoint tells of the starts that have led to it."""

import json

from utils.runtime.provenance import STARTS, earlier_starts, write_args

HERE = {
    "images": [1, 2, 3, 4], "memory_format": "contiguous", "engine": "gloo", "workers": 2,
    "versions": {"torch": "2.15"}, "git_commit": "abc", "machine": {"cores": 2},
}  # fmt: skip


def start(lr=0.1, **changes):
    options = {"lr": lr, "start_epoch": None, "resume": None}
    return {"options": options, **HERE, **changes}


def checkpoint_of(one, *earlier):
    return {"epoch": 3, "state_dict": {}, **one, "earlier": list(earlier)}


def test_a_run_that_goes_on_as_it_was_has_no_earlier_starts():
    assert earlier_starts(None, "", start()) == []
    again = start()
    again["options"]["resume"] = "auto"  # It changes no number.
    assert earlier_starts(checkpoint_of(start()), "f", again) == []


def test_each_other_way_or_place_is_kept_once_and_in_order():
    there = start(git_commit="def", workers=3)
    fast = start(lr=0.2)
    assert earlier_starts(checkpoint_of(start()), "f", there) == [start()]
    assert earlier_starts(checkpoint_of(there, start()), "f", fast) == [start(), there]
    # Back where it began: between two places the list does not grow.
    assert earlier_starts(checkpoint_of(there, start()), "f", start()) == [there]
    assert earlier_starts(checkpoint_of(start(), there), "f", there) == [start()]


def test_a_file_that_is_no_checkpoint_of_a_run_is_kept_by_its_name():
    other = {"options": {}, "file": "best.safetensors"}
    assert earlier_starts({"state_dict": {}}, "best.safetensors", start()) == [other]
    assert earlier_starts(checkpoint_of(start(), other), "f", start()) == [other]


def test_a_start_at_another_epoch_is_no_continuation():
    again = start()
    again["options"]["start_epoch"] = 0
    assert earlier_starts(checkpoint_of(again), "f", again) == [again]


def test_a_checkpoint_that_says_nothing_or_nonsense_of_earlier_starts(tmp_path):
    """Those of older versions do not know where they were written."""
    old = {"state_dict": {}, "options": start()["options"], "workers": 2}
    (unknown,) = earlier_starts(old, "f", start())
    assert unknown["options"] == old["options"]
    assert unknown.keys() == set(STARTS)
    assert unknown["engine"] is None
    for nonsense in (3, [3], None, [{"options": 3}, {"options": {"lr": {1, 2}}}]):
        found = earlier_starts({**checkpoint_of(start()), "earlier": nonsense}, "f", start())
        write_args(tmp_path / "args.json", {**start(), "earlier": found})
        assert json.loads((tmp_path / "args.json").read_text())["options"]["lr"] == 0.1
