"""The commands that start a script with one of the engines, for the other tools and for tests."""

import os
import sys
from importlib import import_module

from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.launch.commands import (
    dist_command,
    dist_environment,
    has_horovod,
    horovod_command,
    local_hosts,
)
from utils.launch.environment import without_leftovers

# The engine of each script: its module, which is imported only when it is asked for, and its class.
_ENGINES = {
    "cifar": ("utils.distributed.ddp", "DDPComm"),
    "cifar_horovod": ("utils.distributed.horovod", "HorovodComm"),
}
SCRIPTS = {"serial": "cifar.py", "dist": "cifar.py", "horovod": "cifar_horovod.py"}


def engine_class(script: str) -> type[Comm]:
    """Return the class of the engine that a script trains with.

    Args:
        script: The name of the script, "cifar" or "cifar_horovod".
    """
    module, name = _ENGINES[script]
    return getattr(import_module(module), name)


def engine_command(engine: str, workers: int, *script: str) -> list[str]:
    """Return the command that starts a script with an engine on this machine, as launcher.sh does.

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
        return dist_command(sys.executable, workers, script)
    if not has_horovod():
        raise UserError("Horovod is not installed: ./setup.sh --horovod builds it")
    return horovod_command(sys.executable, workers, script, local_hosts(workers))


def clean_environment(**changes: str) -> dict[str, str]:
    """Return the environment for ``engine_command``: this one, without what an outer job has left.

    Args:
        changes: Variables to add or to replace.
    """
    inherited = without_leftovers(os.environ).items()
    kept = {name: value for name, value in inherited if not name.startswith("HOROVOD_")}
    return {**kept, **changes, **dist_environment({**kept, **changes})}
