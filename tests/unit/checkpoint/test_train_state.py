"""How far a run has come."""

import pytest

from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.errors import UserError


def test_a_checkpoint_inside_an_epoch_belongs_to_its_batch(tmp_path):
    state = {"epoch": 0, "step": 3, "shape": {"global batch": 32, "seed": 0}}
    train = parse_args(["--epochs", "2"]).train
    loaded = LoadedCheckpoint(tmp_path / "file", state)
    assert TrainState.start(train, loaded, {"global batch": 32, "seed": 0}, 7).step == 3
    with pytest.raises(UserError, match="global batch 32, not 16"):
        TrainState.start(train, loaded, {"global batch": 16, "seed": 0}, 7)


def test_a_job_that_was_started_again_does_not_begin_at_start_epoch_again(tmp_path):
    """It goes on from what it has saved itself."""
    train = parse_args(["--epochs", "5", "--start-epoch", "1"]).train
    state = {"epoch": 3, "step": 0}
    for own, epoch in ((False, 1), (True, 3)):
        loaded = LoadedCheckpoint(tmp_path / "file", state, own=own)
        assert TrainState.start(train, loaded, {}, 7).epoch == epoch
