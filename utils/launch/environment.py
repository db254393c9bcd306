"""What a job finds on this machine: its GPUs and cores, and the environment that it gets."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# What an outer launcher leaves in the environment would change the meaning of an inner one, and
# PYTHONSAFEPATH would keep a script from finding its own modules.
_LEFTOVER = re.compile(
    "(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|NODE_RANK|MASTER_(ADDR|PORT)|PYTHON_EXEC|PYTHONSAFEPATH"
    "|(ROLE|PET|TORCHELASTIC)_[A-Za-z0-9_]*"
)

# horovodrun puts the values of its environment on a command line that everybody can read, and runs
# what stands in their names: it gets those that training needs, by name.
_FOR_HOROVOD = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|TERM|COLUMNS|LINES|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV"
    "|XDG_CACHE_HOME|PYTHON[A-Za-z0-9_]*"
    "|(LC|OMP|MKL|CUDA|NVIDIA|NCCL|GLOO|HOROVOD|TORCH|PYTORCH|CIFAR)_[A-Za-z0-9_]*"
)


def leftovers(environment: Mapping[str, str]) -> list[str]:
    """Return the names of the variables that a job must not inherit, sorted."""
    return sorted(filter(_LEFTOVER.fullmatch, environment))


def without_leftovers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that a job must not inherit."""
    dropped = leftovers(environment)
    return {name: value for name, value in environment.items() if name not in dropped}


def for_horovod(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of an environment that horovodrun may see."""
    return {name: value for name, value in environment.items() if _FOR_HOROVOD.fullmatch(name)}


def gpu_count() -> int:
    """Return the number of GPUs that the NVIDIA driver shows, CUDA_VISIBLE_DEVICES or not."""
    if not shutil.which("nvidia-smi"):
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    command = ["nvidia-smi", "--list-gpus"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False).stdout
    except OSError:  # It is there and cannot be executed.
        return 0
    return sum(line.startswith(b"GPU") for line in shown.splitlines())


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
