"""The memory format of a network is tried once and remembered."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import create_model
from utils.checkpoint.restore import load_optimizer
from utils.checkpoint.resume import LoadedCheckpoint
from utils.config.args import parse_args
from utils.distributed.comm import Comm
from utils.runtime import memory_format
from utils.training import build
from utils.training.optim import build_optimizer


class TestMemoryFormat:
    def test_is_tried_once_and_remembered(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        model = create_model("resnet", depth=8)
        before = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        first = memory_format.choose_memory_format("resnet-8", model, 10**6, "off", Comm())
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        (answers,) = tmp_path.rglob("memory-format.json")
        (key,) = json.loads(answers.read_text())
        assert key.startswith("resnet-8 | torch.float32")
        monkeypatch.setattr(memory_format, "_try", lambda *_: pytest.fail("tried again"))
        assert memory_format.choose_memory_format("resnet-8", model, 10**6, "off", Comm()) == first

    def test_a_damaged_memory_or_none_is_no_obstacle(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        model = create_model("alexnet")
        path = tmp_path / "cifar-allreduce" / "memory-format.json"
        path.parent.mkdir()
        path.write_text("[1, 2")
        assert (
            memory_format.choose_memory_format("alexnet", model, 10**6, "off", Comm())
            in memory_format.FORMATS
        )
        assert len(json.loads(path.read_text())) == 1
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
        assert (
            memory_format.choose_memory_format("alexnet", model, 10**6, "off", Comm())
            in memory_format.FORMATS
        )

    @pytest.mark.parametrize(
        ("line", "saved", "wanted"),
        [
            ("--memory-format channels_last", "contiguous", "channels_last"),
            ("--epochs 300", "channels_last", "channels_last"),
            ("--epochs 300 --deterministic", None, "contiguous"),
            ("--epochs 1", None, "contiguous"),  # 1,000 images are not worth a trial
        ],
    )
    def test_the_command_line_and_the_checkpoint_come_first(self, line, saved, wanted, tmp_path):
        config = parse_args(["-a", "alexnet", "-d", "synthetic10", *line.split()])
        config = config.replace(data=replace(config.data, train_size=1000, test_size=10))
        comm = Comm()
        loaded = None
        if saved:
            state = {"memory_format": saved, "state_dict": create_model("alexnet").state_dict()}
            loaded = LoadedCheckpoint(tmp_path / "file", state)
        dataset = build.dataset(config.data)
        splits = build.splits(dataset, config, comm)
        _, found = build.model(config, dataset, splits, loaded, comm)
        assert found == wanted
        assert splits.train.memory_format == memory_format.FORMATS[wanted]

    def test_momentum_is_laid_out_like_its_parameter(self, tmp_path):
        model = nn.Conv2d(3, 4, 3)
        optimizer = build_optimizer(model, 0.1, 0.9, 0, False)
        model(torch.ones(1, 3, 8, 8)).sum().backward()
        optimizer.step()
        other = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        fresh = build_optimizer(other, 0.1, 0.9, 0, False)
        load_optimizer(fresh, {"optimizer": optimizer.state_dict()}, tmp_path)
        momentum = fresh.state[other.weight]["momentum_buffer"]
        assert momentum.stride() == other.weight.stride()
        assert torch.equal(momentum, optimizer.state[model.weight]["momentum_buffer"])
