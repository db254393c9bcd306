"""The launcher's own options: how they read, and what is wrong with them on this machine."""

import difflib
import os
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils.config.args import DATASETS
from utils.config.recipes import Recipe, find_recipe
from utils.errors import UserError
from utils.launch.commands import CONTROL, INTERFACES, Hosts, loopback_interface, shell_line
from utils.launch.environment import core_count, gpu_count

USAGE = """\
usage: ./launcher.sh -m MODEL [-n WORKERS] [-g GPUS] [-d DATASET] [-f dist|horovod] [-- FLAGS]
  -m MODEL     a recipe, such as resnet110 or wrn-28-10 (--list shows them)
  -n WORKERS   worker processes (default: one per GPU of -g, else per GPU of the machine, else 1)
  -g GPUS      ids of the GPUs to use, such as 0,1 (default: all; the CPU where there is none)
  -d DATASET   cifar10 (default), cifar100, folder, synthetic10 or synthetic100
  -f ENGINE    dist (PyTorch DistributedDataParallel, default) or horovod
  --port N     dist: port of the rendezvous on 127.0.0.1 (default: a free one)
  --hosts LIST horovod: host:slots,... for workers on several machines (default: all here)
  --network-interfaces LIST
               horovod: those that the hosts reach each other by, such as eth0 (default: lo where
               all workers are here, else Horovod looks for them)
  --min-np N, --max-np N, --host-discovery-script FILE
               horovod: go on with any number of workers between N and N when some are lost or new
               ones come; FILE prints the hosts of the moment, host:slots a line
  --max-restarts N
               start again, from the newest checkpoint, after a failure that need not come again:
               a killed or stalled worker, a lost connection (default: 3; 0 to 1000)
  --seeds LIST
               train with each seed of a list such as 0-4 or 0,2,7, one after the other, or one per
               -n GPUs at a time (-n is 1 by default); print mean and standard deviation; the same
               command goes on after an interruption
  --yes        horovod: build it first where it is missing (minutes, once)
  --list       show the recipes
  --dry-run    print the command and its environment, start nothing
  --compare    train with one process, dist and horovod; compare losses, parameters and speed
  --verify     prove on this machine that workers, engine and interruptions change no result
  --bench [loader|step|epoch|scaling|allreduce|all]
               measure this machine (minutes), write bench-results/; -- -h lists its flags
  --version    print the version of this project
  -h           this text
What stands after -- goes to cifar.py and wins over the recipe; python cifar.py -h lists its flags.
"""

BENCHMARKS = ("loader", "step", "epoch", "scaling", "allreduce", "all")
ENGINES = ("dist", "horovod")

_VALUES = {
    "-m": "model", "-n": "workers", "-g": "gpus", "-d": "dataset", "-f": "engine",
    "--port": "port", "--hosts": "hosts", "--network-interfaces": "interfaces",
    "--min-np": "min_np", "--max-np": "max_np", "--host-discovery-script": "discovery",
    "--max-restarts": "restarts", "--seeds": "seeds",
}  # fmt: skip
_SWITCHES = {"--dry-run": "dry_run", "--yes": "yes"}
_TEXTS = {"--list": "list", "-h": "help", "--help": "help", "--version": "version"}
_TOOLS = {"--compare": "tools.compare", "--verify": "tools.verify", "--bench": "bench"}

_HOST = r"[A-Za-z0-9][A-Za-z0-9.-]*:[1-9][0-9]{0,3}"
_INTERFACE = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_GPU = r"(0|[1-9][0-9]{0,3})"
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Options:
    """The command line of launcher.sh, as it was typed.

    Attributes:
        show: The text to print in place of a training: "help", "version" or "list"; empty for none.
        tool: The module to run in place of a training; empty for none.
        flags: What stands after ``--``.
    """

    model: str = ""
    workers: str = ""
    gpus: str = ""
    dataset: str = "cifar10"
    engine: str = "dist"
    port: str = ""
    hosts: str = ""
    interfaces: str = ""
    min_np: str = ""
    max_np: str = ""
    discovery: str = ""
    restarts: str = "3"
    seeds: str = ""
    show: str = ""
    dry_run: bool = False
    yes: bool = False
    tool: str = ""
    benchmark: str = "all"
    flags: tuple[str, ...] = ()

    def words(self, **changes: Any) -> list[str]:
        """Return a command line that reads as these options, but for what is printed or measured.

        Args:
            changes: Attributes that have other values in it.
        """
        changed = replace(self, **changes)
        pairs = [(flag, getattr(changed, name)) for flag, name in _VALUES.items()]
        words = [word for flag, value in pairs if value for word in (flag, value)]
        return [*words, *(["--yes"] if changed.yes else []), "--", *changed.flags]


def read_options(words: Sequence[str]) -> Options:
    """Return the options of a command line. Of an option that stands there twice the last counts.

    Raises:
        UserError: An option is unknown, or lacks its value.
    """
    found: dict[str, Any] = {}
    left = list(words)
    while left and found.get("show") in (None, "list"):
        word, *attached = _split(left.pop(0))
        left = [*attached, *left]
        if word == "--":
            found["flags"] = tuple(left)
            break
        if word in _VALUES:
            value = left.pop(0) if left else ""
            if not value or re.match("-[^0-9]", value):
                raise UserError(f"{word} '{value}': needs a value; ./launcher.sh -h shows which")
            found[_VALUES[word]] = value
        elif word in _SWITCHES:
            found[_SWITCHES[word]] = True
        elif word in _TEXTS:
            found["show"] = _TEXTS[word]
        elif word in _TOOLS:
            found["tool"] = _TOOLS[word]
            if word == "--bench" and left and left[0] and not left[0].startswith("-"):
                found["benchmark"] = left.pop(0)
        else:
            raise UserError(
                f"unknown option '{word}'; flags for cifar.py go after --, "
                "./launcher.sh -h shows the others"
            )
    return Options(**found)


def _split(word: str) -> list[str]:
    """Return an option and the value in the same word, of ``--port=4000`` or ``-n2``, if any."""
    name, equals, value = word.partition("=")
    if equals and name in _VALUES and name.startswith("--"):
        return [name, value]
    if re.match("-[mngdf].", word, re.DOTALL):
        return [word[:2], word[2:]]
    return [word]


def check_benchmark(name: str) -> None:
    """Raise a UserError if there is no such benchmark."""
    if name not in BENCHMARKS:
        *most, last = BENCHMARKS
        raise UserError(f"--bench '{name}': no such benchmark; choose {', '.join(most)} or {last}")


@dataclass(frozen=True)
class Job:
    """What is to be started, and fits this machine.

    Attributes:
        gpus: The ids of the GPUs to use, for CUDA_VISIBLE_DEVICES; None where it stays unset.
        port: The port of the rendezvous on 127.0.0.1; 0 for a free one.
        place: Where the workers of a Horovod job run.
        flags: What the user gives to cifar.py.
        seeds: The seeds of --seeds; empty without it.
        gpu_ids: The GPUs to use, one by one; empty on a machine without.
    """

    recipe: Recipe
    workers: int
    gpus: str | None
    dataset: str
    engine: str
    restarts: int
    port: int
    place: Hosts
    flags: tuple[str, ...]
    seeds: tuple[int, ...]
    gpu_ids: tuple[str, ...]


def check_job(options: Options, visible: str | None) -> Job:
    """Return the job that the options ask for.

    Args:
        options: The options of a command line.
        visible: The value of CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        UserError: A value is malformed, does not fit another one, or this machine.
    """
    if not options.model:
        raise UserError("-m: name a recipe; ./launcher.sh --list shows them")
    _check_engine(options)
    gpu_ids = _check_gpus(options.gpus, visible)
    seeds = _check_seeds(options)
    # With --seeds the other GPUs train other seeds.
    workers = _check_workers(options.workers or ("1" if seeds else ""), len(gpu_ids))
    restarts = _check_restarts(options.restarts)
    place = _check_elastic(options, workers)
    _check_flags(options.flags)
    _check_dataset(options.dataset)
    recipe = find_recipe(options.model)
    port = 0
    if not options.tool:  # --compare chooses these itself.
        port = _check_port(options.port)
        if options.engine == "horovod":
            place = _check_hosts(place, options.interfaces, workers)
    return Job(
        recipe, workers, options.gpus or visible, options.dataset, options.engine, restarts,
        port, place, options.flags, seeds, gpu_ids,
    )  # fmt: skip


def _check_engine(options: Options) -> None:
    """Raise a UserError if the engine is unknown, or an option is for the other one."""
    if options.engine not in ENGINES:
        raise UserError(f"-f '{options.engine}': no such engine; choose dist or horovod")
    others = {"--hosts": options.hosts, "--network-interfaces": options.interfaces}
    right = "horovod"
    if options.engine == "horovod":
        others, right = {"--port": options.port}, "dist"
    for flag, value in others.items():
        if value:
            raise UserError(f"{flag} {value}: for -f {right}; leave it out")


def _check_gpus(gpus: str, visible: str | None) -> tuple[str, ...]:
    """Return the ids of the GPUs to use: those of -g, else of CUDA_VISIBLE_DEVICES, else all.

    Args:
        gpus: The value of -g; empty for none.
        visible: The value of CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        UserError: The value of -g does not fit this machine.
    """
    here = gpu_count()
    if not gpus:
        every = [str(id_) for id_ in range(here)] if visible is None else visible.split(",")
        every = [id_.strip() for id_ in every]
        return tuple(id_ for id_ in every if id_ and id_[0] != "-")[:here]
    if not re.fullmatch(f"{_GPU}(,{_GPU})*", gpus):
        raise UserError(f"-g '{gpus}': give ids such as 0 or 0,1")
    if not here:
        raise UserError(f"-g {gpus}: this machine has no GPU; leave -g out to train on the CPU")
    ids = gpus.split(",")
    for index, id_ in enumerate(ids):
        if int(id_) >= here:
            raise UserError(
                f"-g {gpus}: no GPU {id_} here; this machine has {here}, numbered from 0 to "
                f"{here - 1}"
            )
        if id_ in ids[:index]:
            raise UserError(f"-g {gpus}: {id_} stands there twice; give each id once")
    return tuple(ids)


def _check_workers(workers: str, gpus: int) -> int:
    """Return the number of workers.

    Args:
        workers: The value of -n; empty for the default.
        gpus: The number of GPUs to use.

    Raises:
        UserError: The value of -n is no number, or too large for this machine.
    """
    if not workers:
        return gpus or 1
    if not re.fullmatch("[1-9][0-9]*", workers):
        raise UserError(f"-n '{workers}': give a whole number of 1 or more")
    cores = core_count()
    most = gpus or 16 * cores
    if len(workers) > 5 or int(workers) > most:
        why = f"more workers than the {gpus} GPU(s) to use"
        if not gpus:
            why = f"too many for the {cores} core(s) here"
        raise UserError(f"-n {workers}: {why}; give at most -n {most}")
    return int(workers)


def _check_seeds(options: Options) -> tuple[int, ...]:
    """Return the seeds of a list such as ``0-4`` or ``0,2,7-9``; none without --seeds.

    Raises:
        UserError: The list is malformed, names a seed twice, or does not go with another option.
    """
    seeds = options.seeds
    if not seeds:
        return ()
    if options.tool:
        raise UserError(f"--seeds {seeds}: is for trainings of their own; leave it out")
    if options.port:
        raise UserError(f"--port {options.port}: is for one training; leave it out, or --seeds")
    number = "(?:0|[1-9][0-9]{0,8})"
    if not re.fullmatch(f"{number}(-{number})?(,{number}(-{number})?)*", seeds):
        raise UserError(f"--seeds '{seeds}': give numbers and ranges, such as 0-4 or 0,2,7")
    found: list[int] = []
    for part in seeds.split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not 0 < len(numbers) <= _MOST_SEEDS:
            raise UserError(
                f"--seeds {seeds}: {part} has not 1 to {_MOST_SEEDS} seeds; give the smaller "
                "number first"
            )
        found += numbers
    if len(set(found)) < len(found) or len(found) > _MOST_SEEDS:
        raise UserError(f"--seeds {seeds}: give each seed once, {_MOST_SEEDS} at most")
    return tuple(found)


def _check_restarts(restarts: str) -> int:
    """Return the number of restarts, or raise a UserError."""
    if not re.fullmatch("0|[1-9][0-9]{0,3}", restarts) or int(restarts) > 1000:
        raise UserError(f"--max-restarts '{restarts}': give a whole number from 0 to 1000")
    return int(restarts)


def _check_elastic(options: Options, workers: int) -> Hosts:
    """Return what makes a job elastic, with the hosts as they were typed.

    Raises:
        UserError: The options do not fit each other, or the number of workers.
    """
    least, most, discovery = options.min_np, options.max_np, options.discovery
    if not (least or most or discovery):
        return Hosts(options.hosts)
    if options.engine != "horovod":
        raise UserError(
            "--min-np, --max-np, --host-discovery-script: for -f horovod; leave them out"
        )
    for flag, value in (("--min-np", least), ("--max-np", most)):
        if value and not re.fullmatch("[1-9][0-9]{0,3}", value):
            raise UserError(f"{flag} '{value}': give a whole number from 1 to 9999")
    place = Hosts(
        options.hosts, "", int(least or workers), int(most or workers), discovery=discovery
    )
    if not place.min_np <= workers <= place.max_np:
        raise UserError(
            f"--min-np {place.min_np} --max-np {place.max_np}: -n {workers} must lie between them"
        )
    runs = os.path.isfile(discovery) and os.access(discovery, os.X_OK)
    if discovery and (options.hosts or not runs):
        raise UserError(
            f"--host-discovery-script '{discovery}': give a program that prints host:slots lines, "
            "and no --hosts"
        )
    if not discovery and "," not in options.hosts:
        raise UserError(
            f"--min-np {place.min_np}: needs --host-discovery-script FILE, or two entries in "
            "--hosts"
        )
    return place


def _check_flags(flags: Sequence[str]) -> None:
    """Raise a UserError if a control character would make the printed command look like another."""
    for flag in flags:
        if CONTROL.search(flag):
            raise UserError(f"-- {shell_line([flag])}: holds a control character; leave it out")


def _check_dataset(name: str) -> None:
    """Raise a UserError if there is no such data set; it names those whose names are near."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS) or DATASETS
        raise UserError(f"-d '{name}': no such data set; choose from {', '.join(near)}")


def _check_port(port: str) -> int:
    """Return the port of the rendezvous, 0 for a free one, or raise a UserError."""
    if not port:
        return 0
    if not re.fullmatch("[1-9][0-9]{3,4}", port) or not 1024 <= int(port) <= 65535:
        raise UserError(f"--port '{port}': give a number from 1024 to 65535")
    try:
        socket.create_server(("127.0.0.1", int(port))).close()
    except OSError:
        raise UserError(
            f"--port {port}: in use on 127.0.0.1; leave it out for a free one"
        ) from None
    return int(port)


def _check_hosts(place: Hosts, interfaces: str, workers: int) -> Hosts:
    """Return where the workers run: on this machine unless --hosts says otherwise.

    Args:
        place: What ``_check_elastic`` has returned.
        interfaces: The value of --network-interfaces; empty for the default.
        workers: The number of workers.

    Raises:
        UserError: A value is malformed (host names end up in ssh commands), or does not fit.
    """
    hosts = place.hosts or f"localhost:{workers}"
    if not re.fullmatch(f"{_HOST}(,{_HOST})*", hosts):
        raise UserError(f"--hosts '{hosts}': give host:slots,host:slots,...")
    entries = [entry.split(":") for entry in hosts.split(",")]
    here = ("localhost", socket.gethostname(), os.environ.get("HOSTNAME"))
    for name, _ in entries:
        if name not in here and not name.startswith("127.") and not shutil.which("ssh"):
            raise UserError(
                f"--hosts {hosts}: ssh, which starts workers on other machines, is not installed"
            )
    slots = sum(int(count) for _, count in entries)
    if workers > slots:
        raise UserError(f"-n {workers}: more workers than the {slots} slot(s) of --hosts {hosts}")
    local = not place.discovery and {name for name, _ in entries} <= {"localhost", "127.0.0.1"}
    return replace(place, hosts=hosts, interfaces=_check_interfaces(interfaces, local))


def _check_interfaces(interfaces: str, local: bool) -> str:
    """Return the network interfaces: the loopback one where all hosts are this machine."""
    if not interfaces:
        return loopback_interface() if local else ""
    if not re.fullmatch(f"{_INTERFACE}(,{_INTERFACE})*", interfaces):
        raise UserError(
            f"--network-interfaces '{interfaces}': give names such as eth0, separated by commas"
        )
    for name in interfaces.split(","):
        if INTERFACES.exists() and not os.path.exists(INTERFACES / name):
            raise UserError(
                f"--network-interfaces '{interfaces}': no {name} here; {INTERFACES} lists those "
                "that are"
            )
    return interfaces
