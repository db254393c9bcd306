"""Small training runs that tests interrupt, and whether two of them are the same bit for bit."""

import json

import torch

from utils.checkpoint import format as checkpoint

# Runs of a few seconds that tests interrupt: 197 images in batches of 32, two epochs of 7 steps.
COMMON = [
    "-d", "synthetic10", "--train-size", "197", "--test-size", "50", "--train-batch", "32",
    "--epochs", "2", "--schedule", "1", "--lr", "0.02", "--save-every", "3",
]  # fmt: skip
MODELS = {
    "alexnet": ["-a", "alexnet"],
    "resnet": ["-a", "resnet", "--depth", "8"],
    "wrn with dropout": ["-a", "wrn", "--depth", "10", "--widen-factor", "1", "--drop", "0.3"],
}


def same(one, other):
    """State, log and metrics are equal, times aside."""
    states = [checkpoint.load(folder / checkpoint.LATEST) for folder in (one, other)]
    for part in ("state_dict", "optimizer"):
        tensors = [dict(flat(state[part])) for state in states]
        assert tensors[0].keys() == tensors[1].keys()
        for name, value in tensors[0].items():
            equal = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert equal(value, tensors[1][name]), name
    for key in ("epoch", "step", "acc", "best_acc", "best_epoch"):
        assert states[0][key] == states[1][key]
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()
    records = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (one, other)
    ]
    assert records[0] == records[1]


def flat(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from flat(item, f"{name}.{key}")
    else:
        yield name, value
