"""Write the network of a checkpoint as safetensors, ONNX, or both, and check what was written.

    python tools/export.py CHECKPOINT --safetensors FILE --onnx FILE

The former needs the package safetensors, the latter onnx, onnxscript and onnxruntime. The checks
run 100 images through the network and through what was written.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

# This folder would come first on the path, and its inspect.py would hide that of Python.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from models import create_model, identify
from tools.network import Network, load_network
from utils.errors import FAILED, UserError, command

TOLERANCE = 1e-4  # The largest difference of the logits, relative to the largest of them.


@command
def main() -> int:
    """Export what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the network")
    options = parser.parse_args()
    if not (options.safetensors or options.onnx):
        raise UserError("name a file with --safetensors FILE, --onnx FILE, or both")
    if options.safetensors:
        _require("--safetensors", "safetensors")
    if options.onnx:
        _require("--onnx", "onnx", "onnxscript", "onnxruntime")
    network = load_network(options.checkpoint)
    images = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = network.model(images)
    good = True
    if options.safetensors:
        good &= _report(
            options.safetensors, wanted, _safetensors(network, options.safetensors, images)
        )
    if options.onnx:
        good &= _report(options.onnx, wanted, _onnx(network, options.onnx, images))
    return 0 if good else FAILED


def _require(flag: str, *packages: str) -> None:
    """Raise UserError where a package is missing that the flag needs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"{flag}: {names} missing; install with 'pip install {names}'")


def _report(path: Path, wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Print whether the logits of a written network are those of the network; return it."""
    gap = float((wanted - got).abs().max() / wanted.abs().max())
    good = gap <= TOLERANCE
    verdict = "same logits on 100 images" if good else "OTHER LOGITS than the network"
    print(f"{path}: {verdict} (relative difference {gap:.1e})")
    return good


def _safetensors(network: Network, path: Path, images: torch.Tensor) -> torch.Tensor:
    """Write the weights, read them into a fresh network and return its logits."""
    from safetensors.torch import load_file, save_file

    about = {
        "network": network.name,
        "classes": ",".join(network.classes),
        "mean": " ".join(map(str, network.mean)),
        "std": " ".join(map(str, network.std)),
    }
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    save_file(state, path, metadata=about)
    weights = load_file(path)
    found = identify({name: tuple(tensor.shape) for name, tensor in weights.items()})
    assert found is not None, "the weights that were just written are not recognised"
    fresh = create_model(found[0], **found[1])
    fresh.load_state_dict(weights)
    fresh.eval()
    with torch.inference_mode():
        return fresh(images)


def _onnx(network: Network, path: Path, images: torch.Tensor) -> torch.Tensor:
    """Write the network with a free batch size and return its logits by ONNX Runtime."""
    import onnxruntime

    torch.onnx.export(
        network.model,
        (images[:2],),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(logits)


if __name__ == "__main__":
    sys.exit(main())
