"""The commands that start a script with one of the engines, for the other tools and for tests."""

import importlib.util
import os
import re
import socket
import sys
from importlib import import_module

from utils.distributed.comm import Comm
from utils.errors import UserError

# The engine of each script: its module, which is imported only when it is asked for, and its class.
_ENGINES = {
    "cifar": ("utils.distributed.ddp", "DDPComm"),
    "cifar_horovod": ("utils.distributed.horovod", "HorovodComm"),
}
SCRIPTS = {"serial": "cifar.py", "dist": "cifar.py", "horovod": "cifar_horovod.py"}

# What an outer launcher leaves in the environment would change the meaning of an inner one.
_INHERITED = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|(MASTER|PET|TORCHELASTIC|HOROVOD)_.*")


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def has_horovod() -> bool:
    """Return whether Horovod is installed."""
    return importlib.util.find_spec("horovod") is not None


def engine_class(script: str) -> type[Comm]:
    """Return the class of the engine that a script trains with.

    Args:
        script: The name of the script, "cifar" or "cifar_horovod".
    """
    module, name = _ENGINES[script]
    return getattr(import_module(module), name)


def engine_command(engine: str, workers: int, *script: str) -> list[str]:
    """Return the command that starts a script with an engine on this machine, for tools and tests.

    What users start is built by launcher.sh.

    Args:
        engine: "serial", "dist" or "horovod".
        workers: The number of workers; the serial engine has one.
        script: The path of the script, and its arguments.

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
    """Return this process's environment without what an outer launcher has left.

    Args:
        changes: Variables to add or to replace.
    """
    kept = {name: value for name, value in os.environ.items() if not _INHERITED.fullmatch(name)}
    return {**kept, **changes}
