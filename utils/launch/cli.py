"""The launcher: from a recipe, workers, GPUs and a data set to one command, printed and started.

launcher.sh starts this file by its path. Where its Python lacks what training needs, the variable
CIFAR_PYTHON names the interpreter that will have it; it is installed once the command line has been
checked.
"""

import os
import sys

if __name__ == "__main__":  # Started by its path, it must find the project's folder itself.
    # An empty part of PYTHONPATH is the folder where the user stands. There may lie a random.py,
    # which Python would take for its own.
    for path in [path for path in sys.path if path == os.getcwd()]:
        sys.path.remove(path)
        sys.path.append(path)
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.realpath(__file__), *[".."] * 3)))

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from utils.config.recipes import listing
from utils.errors import UserError, command, reason_of
from utils.files import ROOT
from utils.launch.commands import (
    dist_command,
    dist_environment,
    has_horovod,
    horovod_command,
    project_folder,
    safe_python,
    script_arguments,
    shell_line,
)
from utils.launch.environment import core_count, for_horovod, leftovers, without_leftovers
from utils.launch.options import USAGE, Job, check_benchmark, check_job, read_options
from utils.launch.supervisor import supervise
from utils.log import open_streams
from utils.version import TITLE

PYTHON_VARIABLE = "CIFAR_PYTHON"


@command
def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code.

    Args:
        words: The arguments of launcher.sh.
    """
    missing = os.environ.pop(PYTHON_VARIABLE, "")
    options = read_options(words)
    if options.show:
        texts = {"help": USAGE, "version": f"{TITLE}\n"}
        _print(texts.get(options.show) or listing())
        return 0
    arguments: Sequence[str] = options.flags
    if options.tool == "bench":
        check_benchmark(options.benchmark)
        arguments = [options.benchmark, *options.flags]
    elif options.tool != "tools.verify":
        job = check_job(options, os.environ.get("CUDA_VISIBLE_DEVICES"))
        chosen = ["-m", job.recipe.name, "-n", str(job.workers), "-d", job.dataset]
        arguments = [*chosen, "--", *job.flags]
    if missing and not options.dry_run:
        _install(words)
    python = missing or sys.executable
    if options.tool:
        return _run_tool(options.tool, arguments, python, options.dry_run)
    if job.engine == "horovod" and not options.dry_run and not has_horovod():
        _build_horovod(options.yes)
    if job.seeds:
        return _run_tool("tools.seeds", options.words(), python, options.dry_run)
    return _start(job, python, options.dry_run)


def _start(job: Job, python: str, dry_run: bool) -> int:
    """Print the command that starts the workers, supervise it, and return the exit code.

    Args:
        job: What to start.
        python: The interpreter.
        dry_run: Whether to print only.
    """
    _check_text(ROOT)
    folder = project_folder()
    shown_python = python if folder == ROOT else python.removeprefix(f"{ROOT}/")
    command_line = _command(job, shown_python, folder)
    added = _added_environment(job)
    dropped = leftovers(os.environ)
    shown = [*(f"{name}={value}" for name, value in added.items()), *command_line]
    if dropped:
        shown = ["env", *(f"--unset={name}" for name in dropped), *shown]
    _print(shell_line(shown) + "\n")
    if dry_run:
        return 0
    environment = without_leftovers(os.environ) | added
    if job.engine == "horovod":
        environment = for_horovod(environment)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # The supervisor outlives its reader.
    return supervise(command_line, environment, job.engine == "horovod", job.restarts)


def _check_text(path: Path) -> None:
    """Raise a UserError if a path cannot be handed to torch, which takes UTF-8 only."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: is not UTF-8, which torch needs; move the project") from None


def _command(job: Job, python: str, folder: Path) -> list[str]:
    """Return the command that starts the workers.

    Args:
        job: What to start.
        python: The interpreter.
        folder: The project's folder, as ``project_folder`` returns it.
    """
    arguments = script_arguments(job.recipe, job.dataset, job.flags)
    if job.engine == "horovod":
        script = [str(folder / "cifar_horovod.py"), *arguments]
        return horovod_command(python, job.workers, script, job.place)
    return dist_command(python, job.workers, [str(folder / "cifar.py"), *arguments], job.port)


def _added_environment(job: Job) -> dict[str, str]:
    """Return the variables that a job gets beside those of this process."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, core_count() // job.workers))
    added = {"OMP_NUM_THREADS": threads}
    if job.gpus is not None:
        added["CUDA_VISIBLE_DEVICES"] = job.gpus
    return added | (dist_environment(os.environ) if job.engine == "dist" else {})


def _run_tool(tool: str, arguments: Sequence[str], python: str, dry_run: bool) -> int:
    """Become another command of the project, in the folder where the user stands.

    Args:
        tool: The module.
        arguments: Its arguments.
        python: The interpreter.
        dry_run: Whether to print the command only.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command_line = [*safe_python(python), "-m", tool, *arguments]
    if dry_run:
        _print(shell_line([f"PYTHONPATH={paths}", *command_line]) + "\n")
        return 0
    os.execve(python, command_line, {**os.environ, "PYTHONPATH": paths})


def _print(text: str) -> None:
    """Print a text as bytes: a path is not always text in the encoding of the terminal.

    Raises:
        UserError: Standard output cannot be written to.
    """
    try:
        sys.stdout.buffer.write(os.fsencode(text))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What is left would fail at the end again.
        raise UserError(f"standard output: {reason_of(error)}; send it elsewhere") from None


def _install(words: Sequence[str]) -> NoReturn:
    """Install what training needs, and start again with the interpreter that has it."""
    done = _setup("--which", stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    python = os.fsdecode(done.stdout.rstrip(b"\n"))
    os.execv(python, [python, __file__, *words])


def _build_horovod(allowed: bool) -> None:
    """Build Horovod.

    Raises:
        UserError: It may not be built unasked.
        SystemExit: The build has failed, and has said why.
    """
    if not allowed:
        raise UserError(
            "-f horovod: Horovod is not installed; ./setup.sh --horovod builds it, or add --yes"
        )
    if code := _setup("--horovod").returncode:
        raise SystemExit(code)


def _setup(*words: str, stdout: int | None = None) -> subprocess.CompletedProcess[bytes]:
    # By bash, as a copy of the project may have lost its run bits.
    return subprocess.run(["bash", str(ROOT / "setup.sh"), *words], stdout=stdout, check=False)


if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # For ``--list | head``.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word.
    sys.exit(main(sys.argv[1:]))
