"""Whether all workers run the same thing: code, options, data."""

import argparse
import hashlib
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from utils.config.args import of_the_run
from utils.data.datasets import Dataset
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.files import ROOT


def check_agreement(comm: Comm, describe: Callable[[], Mapping[str, object]]) -> None:
    """Compare named values with rank 0's; every rank must call it. One sum over the workers.

    Args:
        comm: the engine; one worker alone describes nothing.
        describe: gives the values, under the same names on every rank.

    Raises:
        UserError: on all ranks; names a rank and what it has otherwise.
    """
    if comm.size == 1:
        return
    parts = describe()
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in parts.values()]
    own = torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])
    rows = comm.rows(own.to(comm.device)).cpu()
    for rank, row in enumerate(rows):
        differing = (row != rows[0]).nonzero().flatten().tolist()
        if differing:
            name = list(parts)[differing[0]]
            raise UserError(
                f"rank {rank} has another {name} than rank 0: start all workers with the same "
                "code, options and data"
            )


def code() -> dict[str, object]:
    """Digests of the sources, and the version that computes."""
    sources = [
        path for folder in (ROOT, ROOT / "models", ROOT / "utils") for path in folder.glob("*.py")
    ]
    text = b"".join(path.read_bytes() for path in sorted(sources))
    return {"version of the code": hashlib.sha256(text).hexdigest(), "torch": torch.__version__}


def flags(options: argparse.Namespace) -> dict[str, object]:
    """Every option by its flag."""
    return {
        f"--{name.replace('_', '-')}": value for name, value in of_the_run(vars(options)).items()
    }


def contents(data: Dataset) -> dict[str, object]:
    """A digest of the images and labels."""
    arrays = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    sums = [(array.shape, zlib.crc32(np.ascontiguousarray(array).data)) for array in arrays]
    return {"set of images": (sums, data.classes, data.mean, data.std)}
