"""launcher.sh: what it refuses, what it prints, and what it starts."""

import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.launcher import call, quiet
from helpers.process import environment, run
from utils.config.args import DATASETS, parse_args
from utils.config.recipes import load_recipes
from utils.files import ROOT
from utils.launch import cli
from utils.launch.commands import LOOPBACK, shell_line
from utils.launch.environment import core_count

LAUNCHER = ROOT / "launcher.sh"
OURS = (
    "setup.sh", "launcher.sh", "recipes.tsv", "requirements.txt", "requirements-dev.txt", "utils",
)  # fmt: skip

# Stands in for cifar.py: every worker writes down what has reached it.
REPORTER = """
import json, os, sys
names = "OMP_NUM_THREADS CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME WORLD_SIZE MASTER_ADDR".split()
seen = {"argv": sys.argv, "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
with open(os.environ["REPORT"] + os.environ["RANK"], "w") as file:
    json.dump(seen, file)
"""

HOSTILE = [
    "a b", "c$(touch marker)", "`touch marker`", '"', "'", "*", "\\", "", "-x", "--", "&", "| cat",
    "$", "$$", "${local_rank}", "$local_rank", "$HOME", "--lr=0.1", "é", ";touch marker", "#", "~",
]  # fmt: skip


SAFE = "-P" if sys.version_info >= (3, 11) else ""


def write_program(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that shows a number of GPUs, and the empty folder where its user stands."""
    programs, folder = tmp_path / "programs", tmp_path / "here"
    programs.mkdir()
    folder.mkdir()
    monkeypatch.chdir(folder)

    def show(gpus):
        lines = "".join(f"echo 'GPU {i}: H100 (UUID: GPU-{i})'\n" for i in range(gpus))
        write_program(programs / "nvidia-smi", f"#!/bin/sh\n{lines or 'exit 9'}\n")
        return f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    show.programs, show.folder = programs, folder
    return show


@pytest.fixture
def ask(machine, nothing_starts):
    """Call the launcher in this process: for what it refuses, prints and would start."""

    def ask(*words, gpus=0, **variables):
        return call(*words, **{"PATH": machine(gpus), **variables})

    return ask


@pytest.fixture
def launch(machine):
    """Start launcher.sh itself."""

    def start(*words, launcher=LAUNCHER, **variables):
        return run([launcher, *words], env=quiet(**{"PATH": machine(0), **variables}), cwd=None)

    return start


def parts(result):
    """The environment, the launcher's options and the script's arguments of a printed command."""
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith("cifar.py"))
    python = next(i for i, word in enumerate(words) if "python" in word)
    env = dict(word.split("=", 1) for word in words[:python] if word != "env")
    return env, words[python:script], words[script:]


def dry_run(ask, *words, **options):
    return parts(ask("--dry-run", *words, **options))


@pytest.mark.parametrize(
    ("arguments", "gpus", "words"),
    [
        ("-n 2", 0, ["-m", "--list"]),
        ("-m", 0, ["-m", "needs a value"]),
        ("-m -n 2", 0, ["-m '-n'", "needs a value"]),
        ("-m alexnt", 0, ["-m 'alexnt'", "did you mean alexnet"]),
        ("-m resnet", 0, ["-m resnet", "resnet20, resnet110, resnet164, resnet1202"]),
        ("-m alexnet -d cifr10", 0, ["-d 'cifr10'", "cifar10, cifar100"]),
        ("-m alexnet -d imagenet", 0, ["-d 'imagenet'", "synthetic10, synthetic100"]),
        ("-m alexnet -f mpi", 0, ["-f 'mpi'", "dist or horovod"]),
        ("-m alexnet -n 0", 0, ["-n '0'", "1 or more"]),
        ("-m alexnet -n -1", 0, ["-n '-1'", "1 or more"]),
        ("-m alexnet -n abc", 0, ["-n 'abc'", "1 or more"]),
        ("-m alexnet -n 1.5", 0, ["-n '1.5'", "1 or more"]),
        ("-m alexnet -n ''", 0, ["-n ''", "needs a value"]),
        ("-m alexnet -n 99999999999999999999", 0, ["-n 99999999999999999999", "core(s)"]),
        ("-m alexnet -n 99999999999999999999", 2, ["-n 99999999999999999999", "2 GPU(s)"]),
        ("-m alexnet -n 3", 2, ["-n 3", "2 GPU(s)", "-n 2"]),
        ("-m alexnet -n 3 -g 0,1", 4, ["-n 3", "2 GPU(s)", "-n 2"]),
        ("-m alexnet -g 0", 0, ["-g 0", "no GPU", "leave -g out", "CPU"]),
        ("-m alexnet -g 1,2", 2, ["-g 1,2", "no GPU 2", "from 0 to 1"]),
        ("-m alexnet -g 0,1,0", 2, ["-g 0,1,0", "0 stands there twice"]),
        ("-m alexnet -g 0,,1", 2, ["-g '0,,1'", "0,1"]),
        ("-m alexnet -g '0, 1'", 2, ["-g '0, 1'", "0,1"]),
        ("-m alexnet -g 00", 2, ["-g '00'", "0,1"]),
        ("-m alexnet -g all", 2, ["-g 'all'", "0,1"]),
        ("-m alexnet --port 80", 0, ["--port '80'", "1024 to 65535"]),
        ("-m alexnet --port 65536", 0, ["--port '65536'", "1024 to 65535"]),
        ("-m alexnet --port x", 0, ["--port 'x'", "1024 to 65535"]),
        ("-m alexnet --max-restarts -1", 0, ["--max-restarts '-1'", "0 to 1000"]),
        ("-m alexnet --max-restarts=1001", 0, ["--max-restarts '1001'", "0 to 1000"]),
        ("-m alexnet --max-restarts 1e1", 0, ["--max-restarts '1e1'", "0 to 1000"]),
        ("-m alexnet --max-restarts", 0, ["--max-restarts ''", "needs a value"]),
        ("-m alexnet --epochs 2", 0, ["'--epochs'", "after --"]),
        ("-m alexnet cifar10", 0, ["'cifar10'", "after --"]),
        ("-m alexnet -- $'a\\nb'", 0, [r"-- $'a\nb'", "control character"]),
        ("-m alexnet -- a\u009bb", 0, [r"-- $'a\u009bb'", "control character"]),
        ("-m alexnet -- a\u2028b", 0, [r"-- $'a\u2028b'", "control character"]),
    ],
)
def test_bad_input_is_one_line(ask, arguments, gpus, words):
    arguments = [word.replace("$a\\nb", "a\nb") for word in shlex.split(arguments)]
    result = ask(*arguments, gpus=gpus)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_bad_input_of_a_real_start_leaves_nothing(launch, machine):
    result = launch("-m", "alexnt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: -m 'alexnt': no such recipe; did you mean alexnet?\n"
    assert list(machine.folder.iterdir()) == []


def test_a_port_in_use_is_bad_input(ask):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = ask("-m", "alexnet", "--port", port, "--dry-run")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: --port {port}: in use on 127.0.0.1; leave it out for a free one\n"
    )


def test_the_list_and_the_help_name_everything(ask, launch):
    shown = launch("--list").stdout
    assert shown == ask("--list").stdout
    for name, recipe in load_recipes().items():
        (row,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        for cell in (f"{recipe.parameters / 1e6:.2f} M", recipe.authors, recipe.bearpaw):
            assert cell in row
        assert row.endswith(shlex.join(recipe.flags))
    shown = launch("-h")
    assert shown.returncode == 0
    for name in DATASETS:
        assert name in shown.stdout
        assert parse_args(dry_run(ask, "-m", "vgg11", "-d", name)[2][1:]).data.dataset == name


class TestPrintedCommand:
    def test_in_the_folder_of_the_project_paths_are_short(self, ask, monkeypatch):
        monkeypatch.chdir(ROOT)
        env, start, arguments = dry_run(
            ask, "-m", "alexnet", "-n", "2", "--port=41234", OMP_NUM_THREADS="3"
        )
        path = str(ROOT / "utils" / "launch" / "loopback")
        assert env.pop("PYTHONPATH").split(":")[0] == path
        assert env == {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "lo"}
        assert start[1:] == shlex.split(
            f"{SAFE} -W ignore::FutureWarning -m torch.distributed.launch --nproc_per_node=2 "
            "--rdzv-backend=loopback --rdzv-endpoint=127.0.0.1:41234 --log-dir=/dev/null"
        )
        assert arguments == shlex.split(
            "cifar.py -a alexnet --epochs 164 --schedule 81 122 --gamma 0.1 --dataset cifar10 "
            "--checkpoint checkpoints/cifar10/alexnet"
        )

    def test_elsewhere_they_lead_to_the_project(self, ask):
        arguments = dry_run(ask, "-m", "ResNet-110", "-d", "cifar100")[2]
        assert arguments[0] == str(ROOT / "cifar.py")
        config = parse_args(arguments[1:])
        assert config.data.data == str(ROOT / "data")
        assert config.run.checkpoint == str(ROOT / "checkpoints" / "cifar100" / "resnet110")

    def test_what_follows_the_dashes_wins_over_the_recipe(self, ask):
        flags = "--lr 0.5 --epochs 2 -c x".split()
        config = parse_args(dry_run(ask, "-m", "alexnet", "--", *flags)[2][1:])
        assert (config.train.lr, config.train.epochs, config.run.checkpoint) == (0.5, 2, "x")

    @pytest.mark.parametrize(
        ("arguments", "gpus", "changes", "workers", "visible"),
        [
            ("", 0, {}, 1, None),
            ("-n3", 0, {}, 3, None),
            ("", 4, {}, 4, None),
            ("-n 2", 4, {}, 2, None),
            ("-g 3,1", 4, {}, 2, "3,1"),
            ("-g 3,1 -n 1", 4, {}, 1, "3,1"),
            ("-g 3,1", 4, {"CUDA_VISIBLE_DEVICES": "0"}, 2, "3,1"),
            ("", 4, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2, "2,3"),
            ("", 4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, 4, "0,1,2,3,4,5"),
            ("", 0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1, "0,1"),
            ("-n 8", 4, {"CUDA_VISIBLE_DEVICES": ""}, 8, ""),
            ("-n 8", 4, {"CUDA_VISIBLE_DEVICES": "-1"}, 8, "-1"),
        ],
    )
    def test_workers_and_gpus(self, ask, arguments, gpus, changes, workers, visible):
        env, start, _ = dry_run(
            ask, "-m", "alexnet", *arguments.split(), "--port=41234", gpus=gpus, **changes
        )
        assert f"--nproc_per_node={workers}" in start
        assert env.get("CUDA_VISIBLE_DEVICES") == visible
        cores = len(os.sched_getaffinity(0))
        assert env["OMP_NUM_THREADS"] == str(max(1, cores // workers))

    def test_threads_are_shared_out_among_the_cores_of_this_process(self, ask, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
        assert dry_run(ask, "-m", "alexnet", "-n", "3")[0]["OMP_NUM_THREADS"] == "2"

    @pytest.mark.parametrize(
        ("variables", "shown"),
        [
            ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3"}),
            ({"OMP_NUM_THREADS": ""}, {"OMP_NUM_THREADS": str(core_count())}),
            ({"GLOO_SOCKET_IFNAME": "eth7"}, {"GLOO_SOCKET_IFNAME": "eth7"}),
            ({"GLOO_SOCKET_IFNAME": ""}, {"GLOO_SOCKET_IFNAME": "lo"}),
            ({"PYTHONPATH": "/a:/b"}, {"PYTHONPATH": f"{LOOPBACK}:/a:/b"}),
            # An empty part would be the folder where the user stands.
            ({"PYTHONPATH": ""}, {"PYTHONPATH": str(LOOPBACK)}),
        ],
    )
    def test_what_the_user_has_set_stands(self, ask, variables, shown):
        env = dry_run(ask, "-m", "alexnet", **variables)[0]
        assert {name: env[name] for name in shown} == shown

    def test_a_driver_that_cannot_be_asked_shows_no_gpu(self, ask, machine):
        def broken(gpus):
            path = machine(gpus)
            write_program(machine.programs / "nvidia-smi", "#!/no/such/program\n")
            return path

        result = ask("-m", "alexnet", "-g", "0", PATH=broken(1))
        assert result.stderr.startswith("error: -g 0: this machine has no GPU")

    @pytest.mark.parametrize(
        ("words", "module"),
        [
            (["--verify"], "tools.verify"),
            (["--bench", "loader", "--", "--scale", "2"], "bench loader --scale 2"),
            (
                ["--compare", "-m", "ResNet-20", "--", "--lr", "1"],
                "tools.compare -m resnet20 -n 1 -d cifar10 -- --lr 1",
            ),
        ],
    )
    def test_of_another_command_of_the_project(self, ask, words, module):
        result = ask("--dry-run", *words)
        shown = shlex.split(f"PYTHONPATH={ROOT} {sys.executable} {SAFE} -m {module}")
        assert (result.returncode, shlex.split(result.stdout)) == (0, shown)

    def test_the_port_is_a_free_one_at_the_start(self, ask):
        assert "--rdzv-endpoint=127.0.0.1:0" in dry_run(ask, "-m", "alexnet")[1]

    def test_run_takes_over_where_launch_is_gone(self, ask, tmp_path, monkeypatch):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch")
        start = dry_run(ask, "-m", "alexnet")[1]
        assert "torch.distributed.run" in start

    @pytest.mark.parametrize("value", ["a b", "$HOME", "it's", "a\nb", "", "a=b", "é"])
    def test_a_shell_takes_variables_for_variables(self, value):
        program = [sys.executable, "-c", "import os; print(repr(os.environ['PYTHONPATH']))"]
        line = shell_line([f"PYTHONPATH={value}", *program])
        env = {**os.environ, "LC_ALL": "C.UTF-8"}
        shown = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
        assert shown.stdout == f"{value!r}\n", shown.stderr

    def test_a_shell_reads_the_words_as_they_are(self, tmp_path):
        words = [
            *HOSTILE,
            "a\nb",
            "tab\there",
            "\x1b[2J",
            "\u009b",
            "it's\\\n",
            os.fsdecode(b"\xff"),
        ]
        line = shell_line(words)
        assert not re.search("[\x00-\x1f]", line)
        shell = ["bash", "-c", f"printf '%s\\0' {line}"]
        env = {**os.environ, "LC_ALL": "C.UTF-8"}
        shown = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True).stdout
        assert [os.fsdecode(word) for word in shown.split(b"\0")[:-1]] == words


@pytest.fixture
def project(tmp_path):
    """A copy of what the launcher needs, in a folder with an awkward name, with no packages."""
    folder = tmp_path / "my $HOME pro'ject"
    folder.mkdir()
    for name in OURS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "cifar.py").write_text(REPORTER)
    return folder


def test_before_anything_is_installed_the_command_is_shown_and_nothing_made(
    launch, machine, project
):
    for name in ("python", "python3"):  # without site-packages
        write_program(machine.programs / name, f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    before = sorted(project.iterdir())
    start = parts(launch("--dry-run", "-m", "alexnet", launcher=project / "launcher.sh"))[1]
    assert start[0] == str(project / ".venv" / "bin" / "python")
    assert sorted(project.iterdir()) == before
    assert list(machine.folder.iterdir()) == []


class TestSetUp:
    """What is missing is installed when it is needed, and not before."""

    def test_a_failed_installation_ends_the_start(self, launch, machine, project):
        for name in ("python", "python3"):  # without site-packages
            program = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'
            write_program(machine.programs / name, program)
        shutil.copy(ROOT / "constraints.txt", project)
        call = ["-m", "alexnet", "-d", "synthetic10"]
        result = launch(*call, launcher=project / "launcher.sh", PIP_NO_INDEX="1")
        assert (result.returncode, result.stdout) == (2, "")
        assert "call ./setup.sh again" in result.stderr.splitlines()[-1]

    def test_the_interpreter_that_has_it_takes_over(self, ask, monkeypatch):
        """With the same words; the variable that has said what is missing is gone."""
        calls = []
        done = subprocess.CompletedProcess([], 0, b"/the new/python\n")
        monkeypatch.setattr(cli, "_setup", lambda *words, **_: calls.append(words) or done)
        monkeypatch.setattr(os, "execv", lambda *words: calls.append(words) or sys.exit(7))
        words = ["-m", "alexnet", "--", "a b"]
        with pytest.raises(SystemExit, match="7"):
            ask(*words, CIFAR_PYTHON=sys.executable)
        assert calls == [
            ("--which",),
            ("/the new/python", ["/the new/python", str(ROOT / "utils/launch/cli.py"), *words]),
        ]

    @pytest.mark.parametrize(("code", "ends"), [(0, "supervised"), (2, "2")])
    def test_horovod_is_built_if_wanted(self, ask, monkeypatch, code, ends):
        calls = []
        done = subprocess.CompletedProcess([], code)
        monkeypatch.setattr(cli, "has_horovod", lambda: False)
        monkeypatch.setattr(cli, "_setup", lambda *words, **_: calls.append(words) or done)
        monkeypatch.setattr(cli, "supervise", lambda *_: sys.exit("supervised"))
        call = ["-m", "alexnet", "-f", "horovod"]
        refused = ask(*call)
        assert (refused.returncode, refused.stdout, calls) == (2, "", [])
        assert "Horovod is not installed; ./setup.sh --horovod builds it" in refused.stderr
        with pytest.raises(SystemExit, match=ends):
            ask(*call, "--yes")
        assert calls == [("--horovod",)]

    @pytest.mark.parametrize(
        "program",
        ["echo 'pyenv: python3: command not found' >&2; exit 127", "echo 3.9; exit 1"],
        ids=["a shim of nothing", "too old"],
    )
    def test_a_python_that_does_not_do_is_one_line(self, launch, machine, project, program):
        for name in ("python", "python3"):
            write_program(machine.programs / name, f"#!/bin/sh\n{program}\n")
        result = launch("-m", "alexnet", launcher=project / "launcher.sh")
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.endswith("does not run as Python 3.10 or later; put one first on PATH")

    def test_what_is_no_python_has_not_everything(self, launch, machine, project):
        write_program(machine.programs / "python", "#!/bin/sh\nexit 0\n")
        write_program(machine.programs / "python3", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        result = launch("-m", "alexnt", launcher=project / "launcher.sh")
        assert (result.returncode, result.stdout) == (2, "")
        assert "did you mean alexnet" in result.stderr


class TestOutput:
    def test_a_reader_may_take_the_first_line(self, launch):
        words = ["-c", 'set -o pipefail; "$@" | head -n 1', "-", LAUNCHER, "--list"]
        result = launch(*words, launcher="bash")
        assert (result.stdout.split()[0], result.stderr) == ("recipe", "")

    def test_a_message_that_nobody_gets_has_its_exit_code(self, launch):
        for end in ("2>/dev/full", "2>&-"):
            words = ["-c", f'"$@" {end}', "-", LAUNCHER, "-m", "alexnt"]
            assert launch(*words, launcher="bash").returncode == 2

    @pytest.mark.parametrize("module", [os, pytest], ids=["standard library", "site-packages"])
    def test_the_folder_may_be_one_of_pythons_own(self, ask, launch, monkeypatch, module):
        monkeypatch.chdir(Path(module.__file__).parent)
        result = launch("--dry-run", "-m", "alexnet")
        assert parts(result)[1][1:] == parts(ask("--dry-run", "-m", "alexnet"))[1][1:]

    def test_what_cannot_be_printed_is_one_line(self, launch):
        words = ["-c", '"$@" >/dev/full', "-", LAUNCHER, "-m", "alexnet", "--dry-run"]
        result = launch(*words, launcher="bash")
        assert result.returncode == 2
        assert result.stderr == (
            "error: standard output: No space left on device; send it elsewhere\n"
        )


class TestCopies:
    """sbatch and qsub run a copy of the script that they get, and zip files lose run bits."""

    def test_without_run_bits_bash_starts_it(self, launch, project):
        for name in ("launcher.sh", "setup.sh"):
            (project / name).chmod(0o644)
        result = launch(project / "launcher.sh", "--list", launcher="bash")
        assert (result.returncode, result.stderr) == (0, "")
        assert "resnet110" in result.stdout

    @pytest.fixture
    def copy(self, tmp_path):
        spool = tmp_path / "spool" / "job00218"
        spool.mkdir(parents=True)
        return shutil.copy(LAUNCHER, spool / "slurm_script")

    @pytest.mark.parametrize("variable", ["SLURM_SUBMIT_DIR", "PBS_O_WORKDIR"])
    def test_a_copy_goes_to_the_folder_of_the_submission(self, launch, copy, project, variable):
        words = ["--dry-run", "-m", "alexnet"]
        script = parts(launch(*words, launcher=copy, **{variable: str(project)}))[2]
        assert script[0] == str(project / "cifar.py").replace("$", "$$")

    def test_a_copy_asks_slurm_where_it_comes_from(self, launch, machine, copy, project):
        """Submitted from elsewhere, as ``sbatch /path/of/launcher.sh -m alexnet``."""
        words = "-m alexnet -- -c /y/launcher.sh"
        answer = f"JobId=218 JobName=x\n   Command={project}/launcher.sh {words}\n   X=y"
        write_program(machine.programs / "scontrol", f"#!/bin/sh\ncat <<'E'\n{answer}\nE\n")
        words = ["--dry-run", "-m", "alexnet"]
        result = launch(*words, launcher=copy, SLURM_JOB_ID="218", SLURM_SUBMIT_DIR="/")
        assert parts(result)[2][0] == str(project / "cifar.py").replace("$", "$$")

    def test_a_copy_of_nothing_says_what_to_do(self, launch, copy):
        result = launch("--list", launcher=copy, SLURM_SUBMIT_DIR="/")
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {copy} is a copy")
        assert "submit from its folder" in line


def test_arguments_arrive_byte_for_byte_and_the_printed_command_does_the_same(
    launch, machine, project, tmp_path
):
    """From another folder, through a symbolic link, inside the leftovers of another launcher."""
    link = tmp_path / "start it"
    link.symlink_to(project / "launcher.sh")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    leftovers = {"RANK": "7", "WORLD_SIZE": "9", "PET_NNODES": "3", "PYTHON_EXEC": "/bin/false"}
    env = {"REPORT": str(tmp_path / "report"), "TMPDIR": str(temporary), **leftovers}
    call = ["-m", "resnet20", "-n", "2", "-d", "synthetic10", "--", *HOSTILE]

    result = launch(*call, launcher=link, **env)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert list(temporary.iterdir()) == []
    seen = [json.loads((tmp_path / f"report{rank}").read_text()) for rank in range(2)]
    for rank, report in enumerate(seen):
        script, local_rank, *arguments = report.pop("argv")
        assert script == str(project / "cifar.py")
        assert local_rank == f"--local-rank={rank}"
        assert arguments[-len(HOSTILE) :] == HOSTILE
        assert str(project / "checkpoints" / "synthetic10" / "resnet20") in arguments
        assert report["cwd"] == str(machine.folder)
        assert report["WORLD_SIZE"] == "2"
        assert report["MASTER_ADDR"] == "127.0.0.1"
        assert report["GLOO_SOCKET_IFNAME"] == "lo"

    shell = subprocess.run(
        ["bash", "-c", result.stdout], env=environment(**env), cwd=machine.folder, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shell.returncode == 0, shell.stderr
    again = json.loads((tmp_path / "report1").read_text())
    assert again["argv"][2:] == arguments
    assert list(machine.folder.iterdir()) == [], "a hostile argument was executed"


def test_what_is_killed_is_started_again_as_often_as_asked(launch, tmp_path):
    stand_in = tmp_path / "torch" / "distributed"
    stand_in.mkdir(parents=True)
    for folder in (stand_in.parent, stand_in):
        (folder / "__init__.py").write_text("")
    (stand_in / "run.py").write_text("import os\nos.kill(os.getpid(), 9)")
    call = ["-m", "alexnet", "-d", "synthetic10", "--max-restarts", "1"]
    result = launch(*call, PYTHONPATH=str(tmp_path))
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        "the launcher was ended by signal 9 (SIGKILL); restart 1 of 1 from the newest checkpoint",
        "error: the launcher was ended by signal 9 (SIGKILL); training has stopped after 1 restart",
    ]


def test_horovod_trains_and_a_hostile_environment_stays_data(launch, machine, tmp_path):
    """horovodrun itself would run what stands in the names."""
    pytest.importorskip("horovod", reason="./setup.sh --horovod builds it")
    hostile = {
        "BASH_FUNC_module%%": f"() {{ touch {tmp_path}/function; }}",
        f"X;touch {tmp_path}/name;": "1",
        f"HOROVOD_$(touch {tmp_path}/substitution)": "1",
        "CIFAR_VALUE": f"a b;touch {tmp_path}/value;$(touch {tmp_path}/value)'\"",
    }
    flags = "--train-size 128 --test-size 64 --epochs 1 --schedule 0".split()
    target = tmp_path / "run"
    result = launch(
        "-m", "alexnet", "-n", "2", "-d", "synthetic10", "-f", "horovod", "--", *flags,
        "-c", str(target), **hostile,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 (Horovod" in result.stdout
    assert result.stdout.count("Last acc:") == 1
    assert "<stdout>" not in result.stdout, "horovodrun's tags"
    assert (target / "checkpoint.pth.tar").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"programs", "here", "run"}
    assert list(machine.folder.iterdir()) == []
