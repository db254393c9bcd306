"""Say in one screen what a checkpoint holds, of this suite or of an older script of its family.

python tools/inspect.py FILE...
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Run as a script, this folder comes first on the path, where this file would pass for the
# standard library's inspect.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models import identify
from utils.checkpoint import format as checkpoint
from utils.errors import command


def describe(path: Path, state: Mapping[str, Any]) -> list[str]:
    """What a loaded checkpoint holds, a line each."""
    weights = state["state_dict"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = identify(shapes)
    counted = [t for name, t in weights.items() if not _is_buffer(name)]
    parameters = sum(tensor.numel() for tensor in counted)
    lines = [f"file       {path}, {path.stat().st_size:,} bytes"]
    if "format" in state:
        lines.append(f"format     {state['format']} of this suite")
    else:
        lines.append("format     of another script of this family")
    if found is None:
        lines.append(
            f"network    unknown, {len(weights)} tensors, {parameters:,} parameters: of no network "
            "of this suite, or incomplete"
        )
    else:
        arch, arguments = found
        lines.append(f"network    {checkpoint.describe_model(arch, arguments)}, "
                     f"{parameters:,} parameters, complete")  # fmt: skip
        if arguments.get("block_name") == "bottleneck" and arguments["depth"] == 164:
            lines.append("           scripts from before 2018 called this 164-layer network "
                         f"{'Pre' if arch == 'preresnet' else ''}ResNet-110")  # fmt: skip
    epoch = state.get("epoch", "unknown")
    step = f", step {state['step']} of the next" if state.get("step") else ""
    lines.append(f"trained    {epoch} epochs{step}")
    for key, title in (("acc", "last"), ("best_acc", "best")):
        if key in state:
            lines.append(f"{title:<10} {float(state[key]):.2f} % validation accuracy")
    momentum = len((state.get("optimizer") or {}).get("state", {}))
    lines.append(f"optimizer  {f'momentum of {momentum} tensors' if momentum else 'none'}")
    if "dataset" in state:
        lines.append(f"data       {state['dataset']}, {len(state['classes'])} classes")
    if "versions" in state:
        versions = ", ".join(f"{k} {v}" for k, v in state["versions"].items() if v)
        lines.append(f"written    by {state['workers']} worker(s) with {versions}")
    return lines


def _is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@command
def main() -> int:
    """Describe the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--trust-checkpoint", action="store_true",
                        help="read a file even if that runs code in it")  # fmt: skip
    options = parser.parse_args()
    for path in options.files:
        state = checkpoint.load(path, flag="FILE", trust=options.trust_checkpoint)
        print("\n".join(describe(path, state)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
