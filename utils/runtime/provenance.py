"""Where a result comes from: code, versions, commit, machine and options, for args.json."""

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

from utils.config.schema import WITHOUT_EFFECT, image_options
from utils.distributed.comm import Comm
from utils.files import ROOT
from utils.launch.environment import core_count
from utils.version import VERSION


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
        "host": platform.node(),
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


def write_args(path: Path, options: Mapping[str, Any], comm: Comm, goes_on: bool) -> None:
    """Write args.json: everything that is needed to run this again.

    Args:
        path: The file.
        options: The options of the run.
        comm: The engine.
        goes_on: Whether the file holds an earlier start of the same run. Where that was another
            training or was trained elsewhere, it is kept under "earlier".
    """
    record: dict[str, Any] = {
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "options": options,
        "engine": comm.name,
        "workers": comm.world_size,
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
    }
    if goes_on and (earlier := _earlier_starts(path, record)):
        record["earlier"] = earlier
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _earlier_starts(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the starts that args.json knows, oldest first, but for those like the next one."""
    try:
        before = json.loads(path.read_text())
        starts = [*before.pop("earlier", []), before]
        pairs = zip(starts, [*starts[1:], record], strict=True)
        return [one for one, following in pairs if _essence(one) != _essence(following)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []  # It is lost or damaged, which is no reason not to go on.


def _essence(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a start another training, or says where it was trained."""
    left_out = WITHOUT_EFFECT - {*image_options(start["options"]["dataset"])}
    options = {k: v for k, v in start["options"].items() if k not in left_out}
    return {**start, "options": options, "command": None}
