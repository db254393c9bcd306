"""The commands that start the workers of a job on both engines.

The options of torch.distributed.launch and of horovodrun stand nowhere else in the program.
"""

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.config.recipes import Recipe
from utils.files import ROOT

# Characters that move the cursor, or end a line, where a text is shown.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# The network interfaces of this machine, where there is such a folder.
INTERFACES = Path("/sys/class/net")

# Where the workers of one machine meet: loopback/loopback.py.
LOOPBACK = ROOT / "utils" / "launch" / "loopback"


@dataclass(frozen=True)
class Hosts:
    """Where the workers of a Horovod job run.

    Attributes:
        hosts: ``host:slots,...``, which counts where ``discovery`` is empty.
        interfaces: The network interfaces that the hosts reach each other by, separated by commas;
            empty where Horovod is to look for them.
        min_np: The least number of workers that an elastic job continues with; 0 for a job that is
            not elastic.
        max_np: The largest number of workers of an elastic job.
        discovery: The path of the program that prints the hosts of the moment; empty for none.
    """

    hosts: str
    interfaces: str = ""
    min_np: int = 0
    max_np: int = 0
    discovery: str = ""


def safe_python(python: str) -> list[str]:
    """Return the start of a command that finds no module in the folder where the user stands.

    Python 3.10 has no option for that. The interpreter is taken to be as new as the running one.
    """
    return [python, "-P"] if sys.version_info >= (3, 11) else [python]


def dist_command(python: str, workers: int, script: Sequence[str], port: int = 0) -> list[str]:
    """Return the command that starts the workers of DistributedDataParallel on this machine.

    It needs the variables of ``dist_environment``.

    Args:
        python: The interpreter.
        workers: The number of workers.
        script: The path of the script and its arguments.
        port: The port of the rendezvous on 127.0.0.1; 0 for a free one.
    """
    # The launcher announces that it will be replaced one day; nobody who trains can act on that.
    # Without a log folder it would make one in /tmp at each start and leave it there.
    return [
        *safe_python(python), "-W", "ignore::FutureWarning", "-m", _launch_module(),
        f"--nproc_per_node={workers}", "--rdzv-backend=loopback",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--log-dir=/dev/null",
        # The launcher reads $ in what follows as the start of a name, and $$ as $.
        *(word.replace("$", "$$") for word in script),
    ]  # fmt: skip


def dist_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that ``dist_command`` needs beside those of an environment."""
    paths = environment.get("PYTHONPATH") or str(LOOPBACK)
    if paths.split(os.pathsep)[0] != str(LOOPBACK):  # as in an environment that this has made
        paths = f"{LOOPBACK}{os.pathsep}{paths}"
    added = {"PYTHONPATH": paths}
    if loopback := loopback_interface():
        added["GLOO_SOCKET_IFNAME"] = environment.get("GLOO_SOCKET_IFNAME") or loopback
    return added


def loopback_interface() -> str:
    """Return the name of the network interface for workers on this machine; empty if unknown."""
    return "lo" if (INTERFACES / "lo").exists() else ""


def _launch_module() -> str:
    """Return the module that starts the workers: torch.distributed.run where launch is gone."""
    spec = importlib.util.find_spec("torch")
    here = not spec or (Path(spec.origin or "").parent / "distributed" / "launch.py").exists()
    return "torch.distributed.launch" if here else "torch.distributed.run"


def local_hosts(workers: int) -> Hosts:
    """Return the place of a Horovod job on this machine, which no other machine can reach."""
    return Hosts(f"localhost:{workers}", loopback_interface())


def horovod_command(python: str, workers: int, script: Sequence[str], place: Hosts) -> list[str]:
    """Return the command that starts the workers of Horovod.

    Args:
        python: The interpreter, which has Horovod.
        workers: The number of workers.
        script: The path of the script and its arguments.
        place: Where the workers run.
    """
    program = Path(python).with_name("horovodrun")
    runner = [str(program)] if os.access(program, os.X_OK) else ["-m", "horovod.runner.launch"]
    command = [*safe_python(python), *runner, "-np", str(workers), "--gloo", "--disable-cache"]
    if place.discovery:
        path = place.discovery if "/" in place.discovery else f"./{place.discovery}"
        command += ["--host-discovery-script", shlex.quote(path)]  # horovodrun hands it to a shell.
    else:
        command += ["-H", place.hosts]
    if place.interfaces:
        command += ["--network-interfaces", place.interfaces]
    if place.min_np:
        command += ["--min-np", str(place.min_np), "--max-np", str(place.max_np)]
    return [*command, python, *script]


def project_folder() -> Path:
    """Return the path of the project's folder, which is short where the user stands in it."""
    try:
        return Path() if os.path.samefile(os.curdir, ROOT) else ROOT
    except OSError:  # in a folder that this user may not search
        return ROOT


def script_arguments(recipe: Recipe, dataset: str, flags: Sequence[str]) -> list[str]:
    """Return the arguments of the script that trains a recipe.

    Args:
        recipe: The recipe.
        dataset: The data set.
        flags: What the user gives to the script, which wins over all others.
    """
    folder = project_folder()
    arguments = [*recipe.flags, "--dataset", dataset]
    if folder == ROOT:
        arguments += ["--data", str(ROOT / "data")]
    return [*arguments, "--checkpoint", str(folder / "checkpoints" / dataset / recipe.name), *flags]


def has_horovod() -> bool:
    """Return whether this Python has Horovod."""
    return importlib.util.find_spec("horovod") is not None


def shell_line(words: Sequence[str]) -> str:
    """Return words as one line that a shell reads as they are."""
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and value and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        return f"{name}={_quote(value)}"  # A name in quotes would be a command, no variable.
    if not CONTROL.search(word):
        return shlex.quote(word)
    # In plain quotes a control character would not be what it looks like.
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + CONTROL.sub(_escape, escaped) + "'"


def _escape(character: re.Match[str]) -> str:
    code = ord(character[0])
    return ascii(character[0])[1:-1] if code < 0x80 else f"\\u{code:04x}"
