"""Say in one screen what a checkpoint holds, of this suite or of an older script of its family.

python tools/inspect.py FILE...
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models import identify
from utils.checkpoint.format import describe_model, describe_shapes, load
from utils.errors import command, one_line
from utils.training.checkpoint_data import describe_statistics, says_statistics


def describe(path: Path, state: Mapping[str, Any]) -> list[str]:
    """Return what a checkpoint holds, in lines.

    Args:
        path: The file.
        state: Its content, as ``load`` returned it.
    """
    lines = [f"file       {path}, {path.stat().st_size:,} bytes"]
    if "format" in state:
        lines.append(f"format     {state['format']} of this suite")
    elif state.get("weights_alone"):
        lines.append("format     safetensors: weights alone")
    else:
        read_as = f": read {', '.join(state['read_as'])}" if state["read_as"] else ""
        lines.append(f"format     of another script{read_as}")
    weights = state["state_dict"].items()
    lines += _describe_network({k: v for k, v in weights if isinstance(v, Tensor)})
    epoch = state.get("epoch", state.get("trained_epochs", "unknown"))
    step = f", step {state['step']} of the next" if state.get("step") else ""
    lines.append(f"trained    {epoch} epochs{step}")
    options = state.get("options", {})
    split = ("validation " if options.get("val_split") else "test ") if options else ""
    # A save inside the first epoch holds zeros that nobody has measured.
    measured = state.get("best_epoch", 1) or state.get("best_acc")
    for key, title in (("acc", "last"), ("best_acc", "best")):
        if key in state and measured:
            lines.append(f"{title:<10} {state[key]:.2f} % {split}accuracy")
    if state.get("best_epoch"):
        lines[-1] += f" after epoch {state['best_epoch']}"
    momentum = _count_momentum(state.get("optimizer"))
    lines.append(f"optimizer  {f'momentum of {momentum} tensors' if momentum else 'none'}")
    if "dataset" in state:
        classes = f", {len(state['classes'])} classes" if "classes" in state else ""
        lines.append(f"data       {state['dataset']}{classes}")
    if says_statistics(state):
        lines.append(f"normalised {describe_statistics(state['mean'], state['std'])}")
    else:
        lines.append("normalised unknown; taken for the legacy statistics where it is evaluated")
    if state.keys() >= {"versions", "workers"}:
        versions = ", ".join(f"{k} {v}" for k, v in state["versions"].items() if v)
        lines.append(f"written    by {state['workers']} worker(s) with {versions}")
    return [one_line(line) for line in lines]


def _describe_network(weights: Mapping[str, Tensor]) -> list[str]:
    """Return in lines which network the weights belong to."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = identify(shapes)
    parameters = sum(tensor.numel() for name, tensor in weights.items() if not _is_buffer(name))
    if found is None:
        return [
            f"network    {describe_shapes(shapes)}, {len(weights)} tensors, {parameters:,} "
            "parameters: of no network of this suite, or incomplete"
        ]
    arch, arguments = found
    lines = [f"network    {describe_model(arch, arguments)}, {parameters:,} parameters, complete"]
    if arguments.get("block_name") == "bottleneck" and arguments["depth"] == 164:
        prefix = "Pre" if arch == "preresnet" else ""
        lines.append(
            f"           scripts from before 2018 called this 164-layer network {prefix}ResNet-110"
        )
    return lines


def _count_momentum(optimizer: Mapping[str, Any] | None) -> int:
    """Return how many tensors an optimizer's state has momentum of."""
    entries = (optimizer or {}).get("state")
    return len(entries) if isinstance(entries, dict) else 0


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@command
def main() -> int:
    """Describe the files of the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a file even if that runs code in it"
    )
    options = parser.parse_args()
    for path in options.files:
        state = load(path, flag="FILE", trust=options.trust_checkpoint)
        print("\n".join(describe(path, state)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
