"""The launcher: from a recipe, workers, GPUs and a data set to one command, printed and started.

launcher.sh starts this file by its path, with any Python 3.10 or later. Where that one lacks what
training needs, the environment variable CIFAR_PYTHON names the interpreter that will have it; it is
installed once the command line has been checked.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # Started by its path, it must find the project's folder itself.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.config.recipes import listing
from utils.errors import UserError, command
from utils.files import ROOT
from utils.launch.commands import (
    dist_command,
    dist_environment,
    has_horovod,
    horovod_command,
    safe_python,
    shell_line,
)
from utils.launch.environment import core_count, for_horovod, leftovers
from utils.launch.options import USAGE, Job, check_benchmark, check_job, read_options
from utils.launch.supervisor import supervise
from utils.log import open_streams
from utils.version import VERSION

PYTHON_VARIABLE = "CIFAR_PYTHON"


@command
def main(words: Sequence[str]) -> int:
    """Run the command line and return the exit code.

    Args:
        words: The arguments of launcher.sh.
    """
    python = os.environ.pop(PYTHON_VARIABLE, sys.executable)
    options = read_options(words)
    if options.show:
        texts = {"help": USAGE, "version": f"CIFAR all-reduce {VERSION}\n"}
        print(texts.get(options.show) or listing(), end="")
        return 0
    if options.tool == "tools.verify":
        _run_tool(options.tool, options.flags, python, words)
    if options.tool == "bench":
        check_benchmark(options.benchmark)
        _run_tool(options.tool, [options.benchmark, *options.flags], python, words)
    job = check_job(options, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if options.tool == "tools.compare":
        chosen = ["-m", job.recipe.name, "-n", str(job.workers), "-d", job.dataset]
        _run_tool(options.tool, [*chosen, "--", *job.flags], python, words)
    if not options.dry_run:
        _ensure_environment(python, words)
        if job.engine == "horovod" and (code := _ensure_horovod(options.yes)):
            return code
    here = os.path.samefile(os.curdir, ROOT)  # Paths can be short then.
    started = _command(job, python.removeprefix(f"{ROOT}/") if here else python, here)
    added = _added_environment(job)
    dropped = leftovers(os.environ)
    shown = [*(f"{name}={value}" for name, value in added.items()), *started]
    if dropped:
        shown = ["env", *(f"--unset={name}" for name in dropped), *shown]
    # As bytes: a path is not always text in the encoding of the terminal.
    sys.stdout.buffer.write(os.fsencode(shell_line(shown) + "\n"))
    sys.stdout.flush()
    if options.dry_run:
        return 0
    environment = {name: os.environ[name] for name in os.environ if name not in dropped} | added
    if job.engine == "horovod":
        environment = for_horovod(environment)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # The supervisor outlives its reader.
    return supervise(started, environment, job.engine == "horovod", job.restarts)


def _command(job: Job, python: str, here: bool) -> list[str]:
    """Return the command that starts the workers.

    Args:
        job: What to start.
        python: The interpreter.
        here: Whether the user stands in the project's folder.
    """
    folder = Path() if here else ROOT
    arguments = [*job.recipe.flags, "--dataset", job.dataset]
    if not here:
        arguments += ["--data", str(ROOT / "data")]
    target = folder / "checkpoints" / job.dataset / job.recipe.name
    arguments += ["--checkpoint", str(target), *job.flags]
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


def _run_tool(tool: str, flags: Sequence[str], python: str, words: Sequence[str]) -> NoReturn:
    """Become another command of the project, in the folder where the user stands."""
    _ensure_environment(python, words)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.execv(sys.executable, [*safe_python(sys.executable), "-m", tool, *flags])


def _ensure_environment(python: str, words: Sequence[str]) -> None:
    """Let the interpreter that will train take over, and install its packages where they lack."""
    if python == sys.executable:
        return
    done = _setup("--which", stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    python = os.fsdecode(done.stdout.rstrip(b"\n"))
    os.execv(python, [python, __file__, *words])


def _ensure_horovod(allowed: bool) -> int:
    """Build Horovod where it is missing, and return the exit code of that.

    Raises:
        UserError: It is missing, and may not be built unasked.
    """
    if has_horovod():
        return 0
    if not allowed:
        raise UserError(
            "-f horovod: Horovod is not installed; ./setup.sh --horovod builds it, or add --yes"
        )
    return _setup("--horovod").returncode


def _setup(*words: str, stdout: int | None = None) -> subprocess.CompletedProcess[bytes]:
    # By bash, as a copy of the project may have lost its run bits.
    return subprocess.run(["bash", str(ROOT / "setup.sh"), *words], stdout=stdout, check=False)


if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # For ``--list | head``.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word.
    sys.exit(main(sys.argv[1:]))
