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


def test_a_best_epoch_that_is_trained_again_counts_no_more(tmp_path, capsys):
    content = {"epoch": 5, "acc": 80.0, "best_acc": 90.0, "best_epoch": 4}
    loaded = LoadedCheckpoint(tmp_path / "file", content)
    for start, best in ((4, (90.0, 4)), (3, (0.0, 0))):
        train = parse_args(["--epochs", "6", "--start-epoch", str(start)]).train
        state = TrainState.start(train, loaded, {}, 7)
        assert (state.best_acc, state.best_epoch) == best
    assert "the best epoch so far, 4, is forgotten" in capsys.readouterr().out
    assert state.advance(0.5), "the first epoch is the best one"


def test_the_best_accuracy_of_an_older_script_has_no_epoch(tmp_path):
    loaded = LoadedCheckpoint(tmp_path / "file", {"epoch": 1, "best_acc": 90.0})
    state = TrainState.start(parse_args(["--epochs", "5"]).train, loaded, {}, 7)
    assert not state.advance(89.0)
    assert (state.best_acc, state.best_epoch) == (90.0, 0)
    assert state.advance(91.0)
    assert (state.best_acc, state.best_epoch) == (91.0, 3)


def test_a_step_behind_the_end_of_an_epoch_is_refused(tmp_path):
    loaded = LoadedCheckpoint(tmp_path / "file", {"epoch": 0, "step": 8})
    with pytest.raises(UserError, match="stands at step 8 of an epoch, which has 7"):
        TrainState.start(parse_args(["--epochs", "5"]).train, loaded, {}, 7)
