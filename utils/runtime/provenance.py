"""Where a result comes from: code, versions, commit, machine, for checkpoints and args.json."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.distributed.comm import Comm
from utils.errors import without_secrets
from utils.files import ROOT, write_text
from utils.launch.environment import core_count
from utils.version import VERSION

# What checkpoints and args.json say of a start of a run: how it trains, on which images, and where.
STARTS = (
    "options", "images", "memory_format", "engine", "workers", "versions", "git_commit", "machine",
)  # fmt: skip


def code_fingerprint(root: Path = ROOT) -> dict[str, object]:
    """Return a digest of all sources that a run executes, and the version of torch."""
    folders = [root / "models", root / "utils"]
    sources = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    text = b"".join(path.read_bytes() for path in sorted(sources))
    return {"version of the code": hashlib.sha256(text).hexdigest(), "torch": torch.__version__}


def versions() -> dict[str, str]:
    """Return the versions of this project and of what computes."""
    return {
        "cifar-allreduce": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # It is a subclass of str otherwise.
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "",
    }


def git_commit() -> str:
    """Return the commit that runs, with "+changes" where files differ; "" outside a clone.

    CIFAR_COMMIT names it where the files were copied without their history.
    """
    if os.environ.get("CIFAR_COMMIT"):
        return os.environ["CIFAR_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+changes" if changed else "")


def machine() -> dict[str, Any]:
    """Return what the run computes on."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
    }


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def origin(comm: Comm) -> dict[str, Any]:
    """Return where and by what a start of a run is trained.

    Args:
        comm: The engine. Rank 0 alone, which writes the files, asks for the commit.
    """
    return {
        "engine": comm.name,
        "workers": comm.world_size,
        "versions": versions(),
        "git_commit": git_commit() if comm.is_main_process else "",
        "machine": machine(),
    }


def shareable(record: Any) -> Any:
    """Return a record of lists and dictionaries with no secret in the addresses that it holds.

    Whatever a file of a run says of it goes through here, for files of a run are shown to others.
    """
    if isinstance(record, str):
        return without_secrets(record)
    if isinstance(record, dict):
        return {name: shareable(value) for name, value in record.items()}
    return [*map(shareable, record)] if isinstance(record, list) else record


def write_args(path: Path, about: Mapping[str, Any]) -> None:
    """Write args.json: everything that is needed to run this again.

    Args:
        path: The file.
        about: What every checkpoint of the run says of it.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    record = {
        "command": shareable([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "job": about["job"],
        **{name: about[name] for name in STARTS},
        "machine": {"host": platform.node(), **about["machine"]},
        **({"earlier": about["earlier"]} if about["earlier"] else {}),
    }
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")
