"""The architectures have names, shapes and counts of published checkpoints, and they learn."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from models import ModelError, create_model, identify, list_models, model_arguments, register
from models._registry import _factories
from utils.config.args import parse_args

# Parameter counts, and names and shapes in order, of checkpoints of bearpaw-style scripts.
REFERENCE = json.loads(Path(__file__).with_name("state_dicts.json").read_text())
OTHERS = [
    "resnet --depth 56", "resnet --depth 29 --block-name bottleneck", "preresnet --depth 26",
    "preresnet --depth 20 --block-name bottleneck", "resnext --depth 20 --widen-factor 2",
    "wrn --depth 16 --widen-factor 2", "densenet --depth 40 --growthRate 24",
    "densenet --depth 22 --compressionRate 3", "vgg11", "vgg13_bn",
]  # fmt: skip
SMALL = {
    "resnet": {"depth": 8},
    "preresnet": {"depth": 8},
    "resnext": {"depth": 11, "cardinality": 2, "widen_factor": 1},
    "wrn": {"depth": 10, "widen_factor": 1, "drop": 0.3},
    "densenet": {"depth": 10, "growth_rate": 4, "drop": 0.2},
}


def parsed(line: str) -> tuple[str, dict]:
    """Return the architecture and the arguments of a line of model flags."""
    model = parse_args(["-a", *shlex.split(line)]).model
    return model.arch, model.arguments()


def shapes_of(name: str, **arguments) -> list:
    """Return the names and shapes of a network's tensors, in order."""
    with torch.device("meta"):
        model = create_model(name, **arguments)
    return [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()]


@pytest.mark.parametrize("line", REFERENCE)
def test_names_shapes_order_and_counts_are_those_of_published_checkpoints(line):
    name, arguments = parsed(line)
    reference = REFERENCE[line]
    assert shapes_of(name, **arguments) == reference["state_dict"]
    for classes in (10, 100):
        with torch.device("meta"):
            model = create_model(name, num_classes=classes, **arguments)
        count = sum(p.numel() for p in model.parameters())
        assert count == reference[f"parameters_cifar{classes}"]


@pytest.mark.parametrize("line", [*REFERENCE, *OTHERS])
def test_a_network_is_identified_by_its_shapes(line):
    name, arguments = parsed(line)
    found = identify(dict(shapes_of(name, num_classes=7, **arguments)))
    assert found is not None
    arguments.pop("drop", None)
    full = {**model_arguments(name), **arguments, "num_classes": 7}
    assert found[0] == name
    assert {key: full[key] for key in found[1]} == found[1]
    assert "num_classes" in found[1]


def test_shapes_of_something_else_are_not_identified():
    assert identify({}) is None
    assert identify({"features.0.weight": (64, 3, 11, 11)}) is None
    damaged = dict(shapes_of("resnet"))
    damaged["fc.weight"] = [10, 63]
    assert identify(damaged) is None


@pytest.mark.parametrize("name", list_models())
def test_every_model_maps_images_to_logits_and_all_its_parameters_learn(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, **SMALL.get(name, {}))
    output = model(torch.randn(4, 3, 32, 32))
    assert output.shape == (4, 7)
    nn.functional.cross_entropy(output, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(image), model(image)), "evaluation is random"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet", {"depth": 14}), ("densenet", {"depth": 16, "growth_rate": 6, "drop": 0.3})],
)
def test_checkpointed_activations_change_nothing(name, arguments):
    results = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = create_model(name, checkpoint_activations=not keep, **arguments)
        for step in range(2):
            torch.manual_seed(step)
            output = model(torch.randn(4, 3, 32, 32))
            output.logsumexp(1).sum().backward()
        results.append((output, [p.grad for p in model.parameters()], model.state_dict()))
    (out1, grads1, state1), (out2, grads2, state2) = results
    assert torch.equal(out1, out2)
    assert all(map(torch.equal, grads1, grads2))
    assert all(torch.equal(state1[key], state2[key]) for key in state1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {"depth": 1202, "checkpoint_activations": True}),
        ("densenet", {"depth": 190, "growth_rate": 40, "checkpoint_activations": True}),
    ],
)
def test_the_giants_run_forward_and_backward(name, arguments):
    model = create_model(name, **arguments)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "arguments", "argument", "words"),
    [
        ("resnet", {"depth": 21}, "depth", "6n + 2 (nearest: 20, 26)"),
        ("resnet", {"depth": 1}, "depth", "nearest: 8"),
        ("resnet", {"depth": 21, "block_name": "BottleNeck"}, "depth", "9n + 2 (nearest: 20, 29)"),
        ("resnet", {"block_name": "x"}, "block_name", "BasicBlock or bottleneck"),
        ("wrn", {"depth": 29}, "depth", "6n + 4 (nearest: 28, 34)"),
        ("wrn", {"drop": 1.0}, "drop", "below 1"),
        ("densenet", {"growth_rate": 0}, "growth_rate", "1 or more"),
        ("resnext", {"cardinality": 0}, "cardinality", "1 or more"),
        ("alexnet", {"depth": 8}, "depth", "does not take it"),
        ("alexnt", {}, "arch", "alexnet"),
    ],
)
def test_what_cannot_be_built_says_why(name, arguments, argument, words):
    with pytest.raises(ModelError) as caught:
        create_model(name, **arguments)
    assert caught.value.argument == argument
    assert words in caught.value.why


def test_adding_a_model_is_registering_a_factory():
    @register("linear-for-a-test")
    def linear(num_classes: int = 10) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

    try:
        assert (
            create_model("linear-for-a-test", num_classes=3)(torch.zeros(1, 3, 32, 32)).numel() == 3
        )
        with pytest.raises(ValueError, match="registered twice"):
            register("linear-for-a-test")(linear)
    finally:
        del _factories["linear-for-a-test"]
