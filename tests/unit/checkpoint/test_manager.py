"""Checkpoints are written whole, and what is damaged is found."""

import os
import random
import signal

import pytest
import torch

from utils.checkpoint import format as checkpoint
from utils.checkpoint import manager
from utils.checkpoint.manager import CheckpointManager, save
from utils.checkpoint.train_state import TrainState
from utils.distributed.comm import Comm
from utils.errors import Interrupted, NotFinite, UserError
from utils.training.optim import build_optimizer


def test_every_flipped_bit_is_found(tmp_path):
    """Or changes nothing that was saved: some bytes of a zip archive mean nothing."""
    state = {"format": 2, "state_dict": {"w": torch.randn(20_000)}, "options": {"lr": 0.1}}
    save(tmp_path, state, is_best=False)
    path = tmp_path / checkpoint.LATEST
    content = path.read_bytes()
    draw = random.Random(0)
    found = 0
    for _ in range(200):
        bit = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            loaded = checkpoint.load(path)
        except UserError:
            found += 1
        else:
            assert torch.equal(loaded["state_dict"]["w"], state["state_dict"]["w"])
    assert found > 180


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_killed_at_any_moment_of_a_save_a_good_file_is_left(tmp_path, call):
    """Before the nth call that touches the disk, for every n; the best is as new or newer."""
    for number in range(4):
        folder = tmp_path / f"{call}{number}"
        folder.mkdir()
        for epoch in (1, 2):
            save(folder, state_of(epoch), is_best=True)
        process = os.fork()
        if process == 0:
            kill_at_call(call, number)
            save(folder, state_of(3), is_best=True)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        _, _, newest = checkpoint.load_newest(folder, trust=False)
        best = checkpoint.load(folder / checkpoint.BEST)
        assert newest["epoch"] in (2, 3)
        assert best["epoch"] >= newest["epoch"]
        assert checkpoint.load(folder / checkpoint.PREVIOUS)["epoch"] < 3
    assert ended == 0, "the last number was meant to be beyond the last call"


def state_of(epoch):
    return {"format": 2, "epoch": epoch, "state_dict": {"w": torch.full((1000,), float(epoch))}}


def kill_at_call(name, number):
    real, done = getattr(os, name), [0]

    def call(*arguments, **named):
        if done[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        return real(*arguments, **named)

    setattr(os, name, call)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1, 0.9, 0.0, False)
    checkpoints = CheckpointManager(tmp_path, Comm(), model, optimizer, {})
    checkpoints.save(TrainState(), is_best=True)
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(NotFinite):
        checkpoints.save(TrainState(epoch=1), is_best=True)
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["epoch"] == 0


def test_the_reason_of_a_failed_save_is_that_of_the_system(tmp_path):
    """torch only says that a file has ended where it should not, and a stop has no part in it."""
    torch_says = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")
    try:
        raise Interrupted
    except Interrupted as stop:
        torch_says.__context__ = stop
    assert manager._reason_and_space(torch_says, tmp_path).startswith("[enforce fail")
    torch_says.__context__ = OSError(28, "No space left on device")
    assert manager._reason_and_space(torch_says, tmp_path).startswith("No space left on device; ")
