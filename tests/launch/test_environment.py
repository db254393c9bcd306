"""Runs in odd environments: a careless shell, another user, a reader that goes away, secrets."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar import run as program
from helpers.process import environment, marked_processes, run
from utils.checkpoint import format as checkpoint
from utils.distributed.ddp import DDPComm
from utils.files import ROOT
from utils.launch.commands import has_horovod
from utils.runtime.exit_codes import run_worker

LAUNCHER = ROOT / "launcher.sh"

QUICK = (
    "-a alexnet --train-size 200 --test-size 50 --train-batch 64 --epochs 1 --schedule 1".split()
)
SYNTHETIC = ["-a", "alexnet", *QUICK, "-d", "synthetic10"]
FILES = ["args.json", "checkpoint.pth.tar", "log.png", "log.txt", "metrics.jsonl",
         "model_best.pth.tar"]  # fmt: skip

# Modules of the standard library that people name their own files after.
HIDDEN = ("random", "types", "socket", "re", "string", "queue", "select", "struct", "token", "copy")


def hide(folder):
    """Files in a folder that end whatever imports them in place of the standard library's."""
    for name in HIDDEN:
        text = (
            f"import os\nos.write(2, b'the {name}.py of the user was imported\\n')\nos._exit(9)\n"
        )
        (folder / f"{name}.py").write_text(text)


def left_by(folder):
    return sorted(path.name for path in folder.iterdir())


def odd_environment(tmp_path, **variables):
    """What a careless shell hands on: no home, no temporary folder, no language, no terminal."""
    env = environment(
        TMPDIR=str(tmp_path / "no such folder"),
        LANG="C",
        LC_ALL="C",
        PYTHONHASHSEED="12345",
        TERM="dumb",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **variables,
    )
    for name in ("HOME", "XDG_CACHE_HOME", "PYTHONPATH", "VIRTUAL_ENV"):
        env.pop(name, None)
    return env


def run_closed(command, **options):
    """Run a command whose standard input is closed, not empty."""
    return run(["bash", "-c", 'exec 0<&-; exec "$@"', "-", *command], **options)


@pytest.fixture
def here(tmp_path):
    """The folder where the user stands, full of files with the names of Python's own."""
    folder = tmp_path / "here"
    folder.mkdir()
    hide(folder)
    yield folder
    assert left_by(folder) == sorted(f"{name}.py" for name in HIDDEN)


@pytest.mark.parametrize(
    "engine",
    ["dist", *(pytest.param(e, marks=pytest.mark.slow) for e in ("serial", "horovod"))],
)
def test_a_careless_shell(engine, here, tmp_path):
    """All at once; what is on the screen tells which of it was too much."""
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    folder = tmp_path / "run"
    if engine == "serial":
        command = [sys.executable, ROOT / "cifar.py", *SYNTHETIC, "-c", folder]
    else:
        command = [
            LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "-f", engine, "--",
            *QUICK, "-c", folder,
        ]  # fmt: skip
    env = odd_environment(tmp_path)
    if engine != "serial":
        env["PYTHONSAFEPATH"] = "1"  # keeps a script from finding what lies beside it
    result = run_closed([str(word) for word in command], env=env, cwd=here)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert left_by(folder) == FILES


UNKNOWN = 54321  # a user id that no machine has a name for
READS = "-all,+dac_read_search"  # may read everything, for the sake of an interpreter in /root
OTHER_USER = [
    "setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups", f"--inh-caps={READS}",
    f"--ambient-caps={READS}", f"--bounding-set={READS}",
]  # fmt: skip


class TestAnotherUser:
    """Who may read the project and write only to a folder of their own."""

    @pytest.fixture
    def place(self):
        """A folder that another user owns, with images that nobody may change."""
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            pytest.skip("only root can become another user (setpriv)")
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        images = folder / "images"
        for part, count in (("train", 250), ("test", 8)):
            for name in ("cat", "dog"):
                (images / part / name).mkdir(parents=True)
                for i in range(count):
                    color = (i * 5 % 256, 200 if name == "cat" else 20, 90)
                    Image.new("RGB", (32, 32), color).save(images / part / name / f"{i}.png")
        home = folder / "home"
        home.mkdir()
        os.chown(home, UNKNOWN, UNKNOWN)
        yield folder
        shutil.rmtree(folder)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_with_a_project_and_data_that_are_read_only(self, place, tmp_path):
        """A user id without a name and without a home, as in many containers."""
        look = [sys.executable, "-c", f"open({str(ROOT / 'cifar.py')!r})"]
        if run([*OTHER_USER, *look]).returncode != 0:
            pytest.skip("the other user cannot start this Python or read the project")
        before = {path: path.stat().st_mtime_ns for path in (place / "images").rglob("*")}
        env = {**odd_environment(tmp_path), "TMPDIR": str(place / "home")}
        command = [
            *OTHER_USER, LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "folder", "--",
            "--epochs", "4", "--schedule", "1", "--data", place / "images",
            "-c", place / "home" / "run",
        ]  # fmt: skip
        result = run(command, env=env, cwd=place / "home")
        assert result.returncode == 0, result.stderr
        assert "Matplotlib" in result.stderr  # it says that it misses a home
        assert len(result.stderr.splitlines()) == 1
        assert "going on without a cache" in result.stdout
        assert set(left_by(place / "home" / "run")) >= set(FILES)
        after = {path: path.stat().st_mtime_ns for path in (place / "images").rglob("*")}
        assert after == before


def test_a_reader_that_goes_away(tmp_path):
    """Training goes on, as under | head -1, and all is there at the end."""
    script = 'set -o pipefail; "$@" | head -1'
    command = [sys.executable, ROOT / "cifar.py", *SYNTHETIC, "-c", tmp_path / "run"]
    result = run(["bash", "-c", script, "-", *command])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert left_by(tmp_path / "run") == FILES


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_are_closed_from_the_start(closed, tmp_path):
    command = [sys.executable, ROOT / "cifar.py", *SYNTHETIC, "-c", tmp_path / "run"]
    result = run(["bash", "-c", f'exec "$@" {closed}', "-", *command])
    assert result.returncode == 0, result.stderr
    assert left_by(tmp_path / "run") == FILES
    assert "Last acc" not in (tmp_path / "run" / "log.txt").read_text()


LAUNCHED = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "5"}, "RANK=5 without WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 WORLD_SIZE=2 without MASTER_PORT"),
        ({**LAUNCHED, "MASTER_ADDR": ""}, "without MASTER_ADDR"),
        ({**LAUNCHED, "RANK": "x"}, "RANK='x'"),
        ({**LAUNCHED, "RANK": "-1"}, "RANK='-1'"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({**LAUNCHED, "LOCAL_RANK": "7"}, "LOCAL_RANK=7"),
        ({**LAUNCHED, "WORLD_SIZE": "1e3"}, "WORLD_SIZE='1e3'"),
        ({**LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_half_of_a_launchers_environment(variables, named, tmp_path, monkeypatch, capfd):
    """What another program has left there is no reason to wait for workers that never come."""
    for name in (*LAUNCHED, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # ranks other than 0 speak later
    assert run_worker(DDPComm, program, [*SYNTHETIC, "-c", str(tmp_path / "run")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in named.split():
        assert word in line
    assert left_by(tmp_path) == []


@pytest.mark.slow
@pytest.mark.horovod
@pytest.mark.parametrize(
    "variables", ["HOROVOD_RANK=1", "HOROVOD_SIZE=2", "HOROVOD_RANK=x HOROVOD_SIZE=2"]
)
def test_half_of_horovodruns_environment(variables, tmp_path):
    if not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    command = [sys.executable, ROOT / "cifar_horovod.py", *SYNTHETIC, "-c", tmp_path / "run"]
    result = run(["env", *variables.split(), *command])
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {variables}: a part only")
    assert left_by(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["cifar.py", "cifar_horovod.py"])
def test_a_script_under_pythonsafepath(script, here, tmp_path):
    if "horovod" in script and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    env = odd_environment(tmp_path, PYTHONSAFEPATH="1")
    result = run([sys.executable, ROOT / script, "--epochs", "x"], env=env, cwd=here)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --epochs: 'x'")


@pytest.mark.parametrize("script", ["cifar.py", "cifar_horovod.py"])
def test_a_link_to_a_script(script, tmp_path):
    """What lies beside the link is not the project's, whatever its name."""
    if "horovod" in script and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    (tmp_path / f"link_to_{script}").symlink_to(ROOT / script)
    for name in ("cifar", "utils", "models"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the project')\n")
    result = run([sys.executable, tmp_path / f"link_to_{script}", "--epochs", "x"])
    assert result.returncode == 2
    assert result.stderr.startswith("error: --epochs: 'x'")


@pytest.mark.parametrize("again", ["true", 'mkdir "$1"'], ids=["gone", "made anew"])
def test_a_folder_that_is_gone(tmp_path, again):
    """Nothing works there, not even torch; bash itself complains before the launcher can."""
    command = [LAUNCHER, "-m", "alexnet", "-d", "synthetic10", "--", "-c", tmp_path / "run"]
    script = f'mkdir "$1" && cd "$1" && rmdir "$1" && {again} && shift && exec "$@"'
    result = run(["bash", "-c", script, "-", tmp_path / "gone", *command])
    assert result.returncode == 2
    *_, last = result.stderr.splitlines()
    assert last == "error: the folder where you stand has been removed; go to another"
    assert left_by(tmp_path) in ([], ["gone"])


def test_a_folder_that_may_not_be_searched(tmp_path):
    """As of one who has become another user there."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become another user (setpriv)")
    words = ["--dry-run", "-m", "alexnet", "-d", "synthetic10"]
    command = [*OTHER_USER, "env", "PATH=/usr/bin:/bin", "bash", LAUNCHER, *words]
    if run(command, cwd="/").returncode != 0:
        pytest.skip("the other user cannot read the project, or has no Python 3.10")
    tmp_path.chmod(0o700)
    result = run(command, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert str(ROOT / "cifar.py") in result.stdout


@pytest.mark.slow
@pytest.mark.horovod
def test_secrets_do_not_show_on_command_lines(tmp_path):
    """horovodrun puts the environment of the workers there, for everybody to read."""
    if not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    before = marked_processes()
    command = [
        LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "-f", "horovod", "--", *QUICK,
        "--epochs", "99", "-c", tmp_path / "run",
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment(API_TOKEN="hunter2", AWS_SECRET_ACCESS_KEY="hunter2", SSHPASS="hunter2"),
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("train loss"):
            break
    processes = marked_processes() - before
    shown = [Path(f"/proc/{number}/cmdline").read_bytes() for number in processes]
    process.terminate()
    process.communicate(timeout=60)
    assert sum(b"HOROVOD_RANK" in text for text in shown) >= 2, "the workers were not looked at"
    assert not any(b"hunter2" in text for text in shown)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_jobs_at_once_do_not_disturb_each_other(tmp_path):
    """Started with defaults on one machine, each trains what it trains alone."""

    def start(name):
        command = [LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "--", *QUICK,
                   "--epochs", "2", "-c", tmp_path / name]  # fmt: skip
        return subprocess.Popen(
            [str(word) for word in command], env=environment(), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    for jobs in (["alone"], ["one", "other"]):
        processes = [start(name) for name in jobs]
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert (process.returncode, err) == (0, b"")
    alone, one, other = (
        checkpoint.load(tmp_path / name / checkpoint.LATEST) for name in ("alone", "one", "other")
    )
    for job in (one, other):
        for name, tensor in alone["state_dict"].items():
            assert torch.equal(tensor, job["state_dict"][name]), name
        for index, state in alone["optimizer"]["state"].items():
            momentum = job["optimizer"]["state"][index]["momentum_buffer"]
            assert torch.equal(state["momentum_buffer"], momentum)


def test_other_hosts_without_ssh(tmp_path):
    """One line from the launcher, and not horovodrun's five attempts."""
    for name in ("bash", "env", "dirname", "readlink", "nproc", "grep", "cat", "wc", "stat"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = environment(PATH=f"{tmp_path}:{Path(sys.executable).parent}")
    if shutil.which("ssh", path=env["PATH"]):
        pytest.skip("ssh lies beside this Python")
    command = [LAUNCHER, "-m", "alexnet", "-f", "horovod", "-n", "2", "--dry-run", "--hosts"]
    for hosts in ("localhost:1,elsewhere:1", "elsewhere:2"):
        result = run([*command, hosts], env=env)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: --hosts {hosts}: ssh, which starts workers on ")
        assert len(result.stderr.splitlines()) == 1
    assert run([*command, "localhost:1,127.0.0.1:1"], env=env).returncode == 0


def test_more_workers_than_images(tmp_path):
    command = [LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "--"]
    result = run([*command, "--train-size", "1", "-c", tmp_path / "run"])
    assert result.returncode == 2
    assert result.stderr == (
        "error: --train-size 1: 2 images are the least for 2 workers times "
        "--backward-passes-per-step 1; give more images\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_debug_level_that_people_are_told_to_set(tmp_path):
    """torch's logger crashes or not, depending on what lies in memory."""
    command = [LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "--max-restarts", "0"]
    env = environment(TORCH_DISTRIBUTED_DEBUG="DETAIL")
    result = run([*command, "--", *QUICK, "-c", tmp_path / "run"], env=env)
    assert result.returncode == 0, result.stderr[-2000:]
