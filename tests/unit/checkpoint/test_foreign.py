"""Files of other scripts: each row of docs/foreign-files.md that is about a checkpoint."""

from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from models import create_model
from utils.checkpoint import format as checkpoint
from utils.checkpoint.fields import check_fields
from utils.checkpoint.restore import load_buffers, load_model, load_optimizer
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.training.optim import build_optimizer


@pytest.fixture
def read(tmp_path):
    """Save what a script saves, and return what is read of it."""

    def save_and_load(content, trust=False, **options):
        path = tmp_path / "file.pth"
        torch.save(content, path, **options)
        return checkpoint.load(path, trust=trust)

    return save_and_load


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("resnet", depth=8)


def renamed(model, change):
    return OrderedDict((change(name), value) for name, value in model.state_dict().items())


def check_weights(state, model, arch="resnet", **arguments):
    """What was read goes into a network of ours, and is that of the model."""
    fresh = create_model(arch, **arguments)
    load_model(fresh, state, "file", "the network")
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_bearpaw(read, network):
    weights = renamed(network, lambda name: f"module.{name}")
    state = read({"epoch": 7, "state_dict": weights, "acc": 90.5, "best_acc": 91.5})
    check_weights(state, network, depth=8)
    assert (state["epoch"], state["acc"], state["best_acc"]) == (7, 90.5, 91.5)
    assert state["read_as"] == []


def test_kuangliu_keeps_the_best_accuracy(read):
    model = create_model("vgg11_bn")
    weights = renamed(model, lambda name: f"module.{name}")
    state = read({"net": weights, "acc": 92.6, "epoch": 180})
    check_weights(state, model, "vgg11_bn")
    assert (state["epoch"], state["acc"], state["best_acc"]) == (180, 92.6, 92.6)
    assert "weights from 'net'" in state["read_as"]


@pytest.mark.parametrize("key", ["net", "model", "model_state_dict", "model_state", "weights"])
def test_weights_under_another_key(read, network, key):
    state = read({"epoch": 1, "arch": "resnet", key: network.state_dict()})
    check_weights(state, network, depth=8)
    assert state["read_as"] == [f"weights from {key!r}"]


def test_the_name_of_a_model_is_no_weights(read, network):
    state = read({"net": "resnet8", "model": {"depth": 8}, "state_dict": network.state_dict()})
    check_weights(state, network, depth=8)
    with pytest.raises(UserError, match="holds no weights"):
        read({"net": "resnet8", "epoch": 1})


@pytest.mark.parametrize(
    "key",
    ["best_prec1", "best_acc1", "best_top1", "best_accuracy", "best_val_acc", "best_prec"],
)
@pytest.mark.parametrize("value", [93.5, torch.tensor(93.5), torch.tensor([93.5])])
def test_the_best_accuracy_under_another_key(read, network, key, value):
    state = read({"epoch": 4, "state_dict": network.state_dict(), key: value})
    assert state["best_acc"] == 93.5
    assert state["read_as"] == [f"best_acc from {key!r}"]


def test_a_fraction_is_an_accuracy_in_per_cent(read, network):
    state = read({"epoch": 4, "net": network.state_dict(), "acc": 0.9, "best_acc": 0.935})
    assert (state["acc"], state["best_acc"]) == (90.0, pytest.approx(93.5))
    assert "best_acc 0.935 as 93.50 %" in state["read_as"]
    state = read({"net": network.state_dict(), "acc": 0.97, "best_acc": 1.0})
    assert (state["acc"], state["best_acc"]) == (97.0, 100.0)


@pytest.mark.parametrize(
    "content",
    [
        {"format": 1, "best_acc": 0.5},
        {"acc": 0.97, "best_acc": 0.97},
        {"acc": 0.9, "best_acc": 63},
        {"best_acc": 1.0},
    ],
    ids=[
        "ours",
        "bearpaw, whose first epoch of CIFAR-100 is at chance",
        "per cent beside it",
        "chance",
    ],
)
def test_a_small_accuracy_is_no_fraction_where_the_unit_is_known(read, network, content):
    state = read({"epoch": 1, "state_dict": network.state_dict(), **content})
    assert state["best_acc"] == content["best_acc"]


@pytest.mark.parametrize(
    "other",
    [{"step": 12000}, {"step": 1}, {"shape": (3, 32, 32)}, {"classes": 10}, {"val_acc": [1.0, 2.0]},
     {"best_epoch": -1}, {"optimizer": "sgd"}, {"optimizer": {"name": "sgd"}}, {"format": "pt"},
     {"network": {"depth": 8}}, {"dataset": {"name": "cifar10"}}, {"format": True},
     {"format": -3, "step": 5}, {"weights_alone": False, "step": 5}, {"digest": "abc"},
     {"acc": True},
     {"mean": [125.3, 123.0, 113.9]}, {"std": 1.0}, {"read_as": 5}, {"options": "lr 0.1"}],
    ids=str,
)  # fmt: skip
def test_what_another_script_means_otherwise_is_left_out(read, network, other):
    state = read({"state_dict": network.state_dict(), "epoch": 3, "best_acc": 90.0, **other})
    assert state["epoch"] == 3
    assert state.keys() == {"state_dict", "epoch", "best_acc", "read_as"}


def test_the_weights_are_where_there_are_some(read, network):
    for empty in ({}, {"x": 1}):
        check_weights(read({"state_dict": empty, "net": network.state_dict()}), network, depth=8)


def test_a_bare_state_dict(read, network):
    state = read(network.state_dict())
    check_weights(state, network, depth=8)
    assert "epoch" not in state


def test_a_network_that_was_pickled_whole(read, network):
    with pytest.raises(UserError, match="--trust-checkpoint"):
        read(network)
    check_weights(read(network, trust=True), network, depth=8)
    check_weights(read({"net": network, "epoch": 1}, trust=True), network, depth=8)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module.backbone.{name}",
        lambda name: name.replace("layer1.", "layer1._orig_mod."),
        lambda name: name.replace("layer2.", "layer2.module."),
        lambda name: name.replace("fc.", "linear.").replace("downsample", "shortcut"),
        lambda name: "net." + name.replace("fc.", "linear.").replace("downsample", "shortcut"),
    ],
    ids=["DataParallel", "compile", "both", "both in turn", "wrapper", "wrappers", "block compiled",
         "block parallel", "akamaster, option B", "akamaster, wrapped"],
)  # fmt: skip
def test_names_with_something_before_them(read, network, change):
    check_weights(read({"state_dict": renamed(network, change)}), network, depth=8)


def test_a_network_that_is_partly_parallel(read):
    """bearpaw's imagenet script: DataParallel around the features of AlexNet and VGG."""
    model = create_model("alexnet")
    weights = renamed(model, lambda name: name.replace("features.", "features.module."))
    check_weights(read({"state_dict": weights}), model, "alexnet")


def test_an_averaged_model(read, network):
    averaged = torch.optim.swa_utils.AveragedModel(network)
    check_weights(read({"state_dict": averaged.state_dict()}), network, depth=8)


def test_names_that_would_become_the_same_stay(read):
    weights = {"module.a": torch.ones(1), "a": torch.zeros(1)}
    assert read({"state_dict": weights})["state_dict"].keys() == weights.keys()


def test_shortcuts_without_parameters_are_told(read, network, tmp_path):
    """Option A of the paper, as in akamaster/pytorch_resnet_cifar10."""
    weights = {
        name.replace("fc.", "linear."): value
        for name, value in network.state_dict().items()
        if "downsample" not in name
    }
    state = read({"state_dict": weights, "best_prec1": 91.7})
    with pytest.raises(UserError, match=r"resnet \(depth 8, .*option A.*, not our resnet"):
        load_model(network, state, tmp_path, "our resnet")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0d71\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><head><title>Virus scan warning", "web page"),
        (b"\n<html>", "web page"),
        (b"\xef\xbb\xbf<!doctype html>", "web page"),
        (b"model.pth".ljust(257, b"\0") + b"ustar\0".ljust(255, b"\0"), "torch before 0.2"),
        (b"", "not a readable checkpoint"),
        (b"some text", "not a readable checkpoint"),
    ],
)
def test_what_is_no_checkpoint_at_all(tmp_path, content, words):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(tmp_path / "file")
    assert "--trust-checkpoint" not in str(caught.value)


def test_what_needs_trust_is_named_where_it_can_be_given(tmp_path, network):
    content = {"state_dict": network.state_dict(), "best_acc": np.float64(93.5)}
    path = tmp_path / "file"
    torch.save({**content, "args": Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match="--trust-checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="would run code in it") as caught:
        checkpoint.load(path, trust=None)
    assert "--trust-checkpoint" not in str(caught.value)
    assert checkpoint.load(path, trust=True)["best_acc"] == 93.5


# --- optimizers ----------------------------------------------------------------------------------


def trained(make, model):
    optimizer = make(model.parameters())
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optim", "optimizer_state"])
def test_an_optimizer_keyed_by_addresses(read, network, key):
    """As torch before 1.6 has saved it, in its old format."""
    state = trained(sgd, network).state_dict()
    ids = {index: 139000000000000 + 72 * index for index in state["param_groups"][0]["params"]}
    old = {
        "state": {ids[index]: entry for index, entry in state["state"].items()},
        "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": list(ids.values())}],
    }
    content = {"epoch": 1, "state_dict": network.state_dict(), key: old}
    found = read(content, _use_new_zipfile_serialization=False)
    fresh = build_optimizer(create_model("resnet", depth=8), 0.1, 0.9, 0, False)
    assert load_optimizer(fresh, found, "file")
    for index, entry in fresh.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state["state"][index]["momentum_buffer"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.Adam, "is not SGD's"),
        (lambda p: sgd([{"params": [q]} for q in p]), "groups of parameters"),
    ],
    ids=["Adam", "groups"],
)
def test_another_optimizer_is_said_and_momentum_is_zero(read, network, capsys, make, words):
    state = {"state_dict": network.state_dict(), "optimizer": trained(make, network).state_dict()}
    fresh = build_optimizer(create_model("resnet", depth=8), 0.1, 0.9, 0, False)
    assert not load_optimizer(fresh, read(state), "file")
    assert words in capsys.readouterr().out
    assert not fresh.state


@pytest.mark.parametrize(
    "optimizer",
    [{"state": {0: 3}, "param_groups": [{"params": [0]}]},
     {"state": {5: {}}, "param_groups": [{"params": [0]}]},
     {"state": {}, "param_groups": [{"params": [0, 0]}]},
     {"state": {0: {"momentum_buffer": "x"}}, "param_groups": [{"params": [0]}]}],
)  # fmt: skip
def test_no_optimizer_at_all_is_damage(read, network, optimizer):
    state = read({"state_dict": network.state_dict(), "optimizer": optimizer})
    with pytest.raises(UserError, match="optimizer state is damaged"):
        load_optimizer(build_optimizer(nn.Linear(1, 1), 0.1, 0.9, 0, False), state, "file")


# --- values that no run writes -------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    "field",
    [{"epoch": -1}, {"epoch": NAN}, {"epoch": float("inf")}, {"epoch": 10**30}, {"epoch": 1.5},
     {"epoch": "3"}, {"epoch": torch.tensor([1, 2])}, {"step": -1}, {"acc": NAN},
     {"best_acc": [1]}, {"best_epoch": -2}, {"step_sums": {"a": 1}}, {"step_sums": ["abc"]},
     {"step_sums": [[NAN] * 4]}, {"step_sums": [[1.0] * 5]}, {"step_seconds": -1.0},
     {"classes": "cat"}, {"classes": []}, {"classes": ["\x1b[31m"]}, {"mean": [0.5]},
     {"std": [1.0, 1.0, 0.0]}, {"dataset": "\x1b[2J"}, {"workers": "\x1b[2Jmany"}, {"shape": [1]},
     {"buffers": torch.tensor(1.0)}, {"versions": 3}, {"optimizer": torch.tensor([1.0, 2.0])},
     {"options": {"lr": torch.zeros(3)}}, {"options": 3}, {"images": [1, 2, 3]},
     {"shape": {"seed": torch.zeros(3)}}, {"mean": [1e300, 0.0, 0.0]}, {"std": [1e-300, 1.0, 1.0]}],
    ids=str,
)  # fmt: skip
def test_a_value_that_no_run_writes_is_refused_in_one_printable_line(read, network, field):
    (name,) = field
    with pytest.raises(UserError, match=f"its '{name}' is .*, which is no ") as caught:
        read({"format": 1, "state_dict": network.state_dict(), **field})
    assert str(caught.value).isprintable()


def test_a_value_that_is_nested_without_end_is_refused(tmp_path, network):
    """torch.save cannot write one, and nothing says that only torch.save writes files."""
    deep = []
    for _ in range(50_000):
        deep = [deep]
    for name in ("epoch", "classes", "options", "shape"):
        with pytest.raises(ValueError, match=f"its '{name}' is a list, which is no "):
            check_fields({name: deep})


def test_weights_of_whole_numbers_are_refused(read, network, tmp_path):
    weights = {name: value.to(torch.int8) for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=r"torch.int8, as of a quantised network"):
        load_model(create_model("resnet", depth=8), read({"state_dict": weights}), tmp_path, "x")


def test_statistics_of_another_width_are_refused(read, network):
    state = read({"format": 1, "state_dict": network.state_dict(), "buffers": torch.zeros(1, 3)})
    with pytest.raises(UserError, match="statistics belong to another network"):
        load_buffers(network, state, "file", Comm())
