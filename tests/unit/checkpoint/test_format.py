"""Checkpoint files: written whole, read without running code, and loaded into networks."""

import pickle
import threading
from argparse import Namespace

import pytest
import torch
from torch import nn

from models import create_model
from utils.checkpoint import format as checkpoint
from utils.checkpoint.manager import save
from utils.checkpoint.restore import load_model, load_optimizer
from utils.errors import UserError
from utils.training.optim import build_optimizer


class TestCheckpoint:
    def state(self, model: nn.Module) -> dict:
        return {"epoch": 3, "state_dict": model.state_dict(), "acc": 1.0, "best_acc": 2.0}

    def test_what_is_saved_comes_back_and_no_temporary_file_stays(self, tmp_path):
        model = create_model("alexnet")
        save(tmp_path, self.state(model), is_best=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.LATEST, checkpoint.BEST]
        for name in (checkpoint.LATEST, checkpoint.BEST):
            state = checkpoint.load(tmp_path / name)
            assert state["epoch"] == 3
            fresh = create_model("alexnet")
            load_model(fresh, state, tmp_path / name, "alexnet")
            assert torch.equal(fresh.classifier.weight, model.classifier.weight)

    def test_a_failed_save_leaves_the_previous_checkpoint(self, tmp_path):
        save(tmp_path, self.state(create_model("alexnet")), is_best=False)
        before = (tmp_path / checkpoint.LATEST).read_bytes()
        with pytest.raises(Exception, match="pickle"):
            save(tmp_path, {"unpicklable": threading.Lock()}, is_best=False)
        assert (tmp_path / checkpoint.LATEST).read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    def test_wrapper_prefixes_and_missing_batch_counters_load(self, tmp_path):
        model = create_model("resnet", depth=8)
        old = {
            f"module.{name}": tensor
            for name, tensor in model.state_dict().items()
            if "num_batches" not in name
        }
        path = tmp_path / "old.pth.tar"
        torch.save({"state_dict": old, "epoch": 1}, path)
        fresh = create_model("resnet", depth=8)
        load_model(fresh, checkpoint.load(path), path, "resnet")
        assert torch.equal(fresh.layer3[0].conv1.weight, model.layer3[0].conv1.weight)

    def test_a_file_in_the_format_of_old_torch_loads(self, tmp_path):
        path = tmp_path / "old.pth.tar"
        torch.save(self.state(create_model("alexnet")), path, _use_new_zipfile_serialization=False)
        assert checkpoint.load(path)["best_acc"] == 2.0

    def test_another_network_is_named(self, tmp_path):
        path = tmp_path / "resnet.pth.tar"
        torch.save(self.state(create_model("resnet", depth=20)), path)
        with pytest.raises(UserError, match=r"holds resnet \(depth 20.*not alexnet") as caught:
            load_model(
                create_model("alexnet"), checkpoint.load(path), path, "alexnet (num_classes 10)"
            )
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
    def test_a_truncated_file_is_bad_input(self, tmp_path, share):
        path = tmp_path / "cut.pth.tar"
        torch.save(self.state(create_model("alexnet")), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(UserError, match=r"cut\.pth\.tar: not a readable checkpoint"):
            checkpoint.load(path)

    def test_code_in_a_file_is_not_run(self, tmp_path):
        marker = tmp_path / "marker"

        class Payload:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        for name, write in (("zip", torch.save), ("plain", pickle.dump)):
            path = tmp_path / name
            with path.open("wb") as file:
                write({"state_dict": Payload()}, file)
            with pytest.raises(UserError, match="not a readable checkpoint"):
                checkpoint.load(path)
        assert not marker.exists()

    def test_a_trusted_file_may_hold_more_than_plain_values(self, tmp_path):
        """Old scripts pickled their options along."""
        path = tmp_path / "old.pth.tar"
        torch.save({**self.state(create_model("alexnet")), "args": Namespace(lr=0.1)}, path)
        with pytest.raises(UserError, match="--trust-checkpoint"):
            checkpoint.load(path)
        assert checkpoint.load(path, trust=True)["best_acc"] == 2.0

    def test_optimizer_state_of_another_network_is_refused(self, tmp_path):
        def trained(model):
            optimizer = build_optimizer(model, 0.1, 0.9, 0, False)
            model(torch.zeros(2, 3, 32, 32)).sum().backward()
            optimizer.step()
            return optimizer

        saved = {"optimizer": trained(create_model("vgg11")).state_dict()}
        fresh = build_optimizer(create_model("alexnet"), 0.1, 0.9, 0, False)
        with pytest.raises(UserError, match="optimizer"):
            load_optimizer(fresh, saved, tmp_path / "x")

    def test_the_settings_of_the_command_line_win_over_the_files(self, tmp_path):
        saved = build_optimizer(nn.Linear(2, 2), 0.1, 0.9, 1e-4, False).state_dict()
        fresh = build_optimizer(nn.Linear(2, 2), 0.2, 0.8, 5e-4, True)
        assert load_optimizer(fresh, {"optimizer": saved}, tmp_path)
        (group,) = fresh.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.8, 5e-4)
        assert group["nesterov"]
