"""Write the network of a checkpoint as safetensors, ONNX, or both, and check what was written.

    python tools/export.py CHECKPOINT --safetensors FILE --onnx FILE

The former needs the package safetensors, the latter onnx, onnxscript and onnxruntime. The checks
run 100 images through the network and through what was written.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
from pathlib import Path

import torch

from tools.network import Network, load_network
from utils.checkpoint.weights import pack
from utils.errors import FAILED, UserError, command, require_packages
from utils.files import write_atomically

TOLERANCE = 1e-4  # The largest difference of the logits, relative to the largest of them.


@command
def main() -> int:
    """Export what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the network")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a file even if that runs code in it"
    )
    options = parser.parse_args()
    if not (options.safetensors or options.onnx):
        raise UserError("name a file with --safetensors FILE, --onnx FILE, or both")
    if options.safetensors:
        require_packages("--safetensors", "safetensors")
    if options.onnx:
        require_packages("--onnx", "onnx", "onnxscript", "onnxruntime")
    network = load_network(options.checkpoint, options.trust_checkpoint)
    print(f"{options.checkpoint}: {network.name}; {network.origin}")
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


def _report(path: Path, wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Print whether the logits of a written network are those of the network; return it."""
    gap = float((wanted - got).abs().max() / wanted.abs().max())
    good = gap <= TOLERANCE
    verdict = "same logits on 100 images" if good else "OTHER LOGITS than the network"
    print(f"{path}: {verdict} (relative difference {gap:.1e})")
    return good


def _safetensors(network: Network, path: Path, images: torch.Tensor) -> torch.Tensor:
    """Write the weights, read them into a fresh network and return its logits."""
    content = pack(network.model.state_dict(), {"network": network.name, **network.said})
    write_atomically(path, lambda file: file.write(content))
    fresh = load_network(path, trust=False)
    with torch.inference_mode():
        return fresh.model(images)


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
