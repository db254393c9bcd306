"""Starting a script with one of the engines, for the tools that compare runs, and for tests."""

import importlib.util
import os
import re
import socket
import sys
from importlib import import_module

from utils.distributed.comm import Comm
from utils.errors import UserError

_CLASSES = {"cifar": "TorchComm", "cifar_horovod": "HorovodComm"}
SCRIPTS = {"serial": "cifar.py", "dist": "cifar.py", "horovod": "cifar_horovod.py"}

# What an outer launcher leaves in the environment; it would change the meaning of an inner one.
_INHERITED = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|(MASTER|PET|TORCHELASTIC|HOROVOD)_.*")


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def has_horovod() -> bool:
    """Whether Horovod is installed."""
    return importlib.util.find_spec("horovod") is not None


def engine_class(module: str) -> type[Comm]:
    """The Comm that a script brings: of "cifar" or of "cifar_horovod", which it imports."""
    return getattr(import_module(module), _CLASSES[module])


def engine_command(engine: str, workers: int, *script: str) -> list[str]:
    """The command that starts a script (with its arguments) with an engine.

    Raises:
        UserError: Horovod is asked for and not installed.
    """
    if engine == "serial":
        return [sys.executable, *script]
    if engine == "dist":
        return [
            sys.executable, "-W", "ignore::FutureWarning", "-m", "torch.distributed.launch",
            f"--nproc_per_node={workers}", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}", "--log-dir=/dev/null", *script,
        ]  # fmt: skip
    if not has_horovod():
        raise UserError("Horovod is not installed: ./setup.sh --horovod builds it")
    return [
        sys.executable, "-m", "horovod.runner.launch", "-np", str(workers),
        "-H", f"localhost:{workers}", "--gloo", sys.executable, *script,
    ]  # fmt: skip


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what an outer launcher has left."""
    kept = {name: value for name, value in os.environ.items() if not _INHERITED.fullmatch(name)}
    return {**kept, **changes}
