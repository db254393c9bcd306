"""What a run that goes on says of what has changed."""

import pytest

from utils.config.args import parse_args
from utils.training.summary import _changes

IMAGES = [1, 2, 3, 4]


def about(*flags, workers=2, images=IMAGES):
    return {"options": parse_args(list(flags)).options(), "workers": workers, "images": images}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (about(), about(), []),
        (about(), about(workers=3), ["the global batch and the order of the images stay"]),
        (
            about("--batch-per-worker", "8"), about("--batch-per-worker", "8", workers=3),
            ["the global batch is another (--batch-per-worker)"],
        ),
        (about(), about(images=[1, 9, 3, 4]), ["these are other images than so far"]),
        (about(), about(images=[1, 2, 3, 9]), ["the test images are others than so far"]),
        (about(), about("--lr", "0.2", "--data", "moved"), ["checkpoint: --lr 0.1 -> 0.2"]),
        (about("-a", "resnet"), about("-a", "resnet", "--depth", "20"), []),  # Its default.
        (about("--start-epoch", "0"), about(), []),
        (about(), about("--start-epoch", "3"), []),  # Another line says where it starts.
        (about(), about("--val-split", "100"), ["--val-split not given -> 100"]),
        ({"options": 3, "images": 3}, about(), []),
        ({}, about(), []),  # a file of another script
    ],
)  # fmt: skip
def test_what_has_changed_is_said_and_nothing_else(before, now, said):
    found = _changes(before, now)
    assert len(found) == len(said)
    assert all(words in change for words, change in zip(said, found, strict=True))
