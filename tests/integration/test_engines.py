"""The contract of Comm on every engine, and that nothing else knows an engine."""

import json
import re
import sys
from functools import partial

import pytest

from helpers import engine_checks
from helpers.process import environment, free_port
from utils.distributed.comm import Comm, launcher_restart_count
from utils.files import ROOT
from utils.launch.commands import has_horovod

CHECKS = [name for name in vars(engine_checks) if name.startswith("check_")]


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        ("serial", 1),
        ("dist", 2),
        ("horovod", 2),
        *(pytest.param(e, n, marks=pytest.mark.slow) for e in ("dist", "horovod") for n in (1, 3)),
    ],
)
def test_engine_keeps_its_promises(launch, engine, workers):
    env = environment(CIFAR_KEEP_DDP="1")  # also with one rank
    result = launch([], workers=workers, script="tests/helpers/engine_checks.py", env=env)
    passed = re.findall(r"(check_\w+) passed", result.stdout)
    assert passed == CHECKS, result.stdout + result.stderr
    assert result.returncode == 0, result.stderr


ALONE = {
    "dist": """
import torch.distributed as dist
from utils.distributed.ddp import DDPComm as Engine
joined = dist.is_initialized
""",
    "horovod": """
from utils.distributed.horovod import HorovodComm as Engine, hvd
joined = hvd.is_initialized
""",
}
JOIN = """
import os
from utils.distributed.comm import Comm
for wanted, kept in ((Comm, ""), (Engine, "1")):
    os.environ["CIFAR_KEEP_DDP"] = kept
    comm = Engine.join(timeout=100)
    assert type(comm) is wanted, type(comm)
    assert joined() == (wanted is Engine)
    comm.close()
print("joined", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("engine", ALONE)
def test_a_launched_job_of_one_rank_is_the_serial_engine(run, engine):
    """No process group, and so no wrapper of one replica, unless a test wants to meet them."""
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    port = str(free_port())
    env = environment(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    result = run([sys.executable, "-c", ALONE[engine] + JOIN], env=env)
    assert result.stdout == "joined\n", result.stderr


@pytest.mark.parametrize("engine", ["dist", "horovod"], indirect=True)
def test_one_launched_worker_trains_what_no_launcher_trains(launch, run_script, tmp_path):
    """Bit for bit; the start-up line names the engine that trains."""
    flags = "-d synthetic10 --train-size 70 --test-size 20 --epochs 1 --schedule 0 -a".split()
    flags += ["resnet", "--depth", "8", "--trace"]
    losses = []
    for name, start in (("launched", partial(launch, workers=1)), ("alone", run_script)):
        trace = tmp_path / f"{name}.json"
        result = start([*flags, trace, "-c", tmp_path / name])
        assert "workers    1 (serial)" in result.stdout, result.stdout + result.stderr
        losses.append(json.loads(trace.read_text())["loss"])
    assert losses[0] == losses[1]


def use_alone(monkeypatch, variables):
    """Have these of the variables that launchers tell their workers by, and no others."""
    for name in ("CIFAR_JOB", "CIFAR_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, 0), ({"CIFAR_RESTARTS": "2"}, 2), ({"CIFAR_RESTARTS": ""}, 0),
     ({"TORCHELASTIC_RESTART_COUNT": "1"}, 0),
     ({"TORCHELASTIC_RESTART_COUNT": "1", "RANK": "0", "CIFAR_RESTARTS": "x"}, 1)],
)  # fmt: skip
def test_restarts_are_those_of_this_job(monkeypatch, variables, count):
    """What another job has left behind would let a run go on in a folder that is not its own."""
    use_alone(monkeypatch, variables)
    assert launcher_restart_count() == count


TORCHRUN = {"RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(
    ("variables", "may_be"),
    [({}, False), (TORCHRUN, True), ({**TORCHRUN, "CIFAR_JOB": "a"}, False),
     ({**TORCHRUN, "CIFAR_JOB": "a", "CIFAR_RESTARTS": "1"}, True), ({"RANK": "0"}, False)],
)  # fmt: skip
def test_what_torchrun_starts_may_have_been_started_before(monkeypatch, variables, may_be):
    """It does not count restarts on account of another machine; our supervisor does."""
    use_alone(monkeypatch, variables)
    assert Comm().may_be_restarted() == may_be


def test_a_job_has_one_id_and_what_nobody_starts_again_is_always_another(monkeypatch):
    def ids(*jobs):
        found = []
        for variables in jobs:
            use_alone(monkeypatch, variables)
            found.append(Comm().job)
        return found

    known = [{"CIFAR_JOB": "a"}, {"CIFAR_JOB": "b"}, TORCHRUN]
    assert ids(*known) == ids(*known)
    assert ids({"CIFAR_JOB": "a", **TORCHRUN}) == ids(known[0])
    leftover = {"TORCHELASTIC_RESTART_COUNT": "0"}
    assert len({*ids(*known, {}, {}, leftover, leftover, {"RANK": "0"})}) == 8


def test_torchrun_stays_the_same_process_while_it_starts_its_workers_again(run, tmp_path):
    """Also where a script of the user is in between; another torchrun is another one."""
    worker, script, ids = (tmp_path / name for name in ("worker.py", "script", "ids"))
    worker.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from utils.launch.processes import giver_of_variables, identity\n"
        "launcher = identity(giver_of_variables('TORCHELASTIC_'))\n"
        f"open({str(ids)!r}, 'a').write(launcher + '\\n')\n"
        "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')"
    )
    script.write_text(f"#!/bin/sh\n'{sys.executable}' '{worker}'\nexit $?\n")
    script.chmod(0o755)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts=1"]
    for words in ([worker], ["--no-python", script]):
        result = run([*start, "--log-dir=/dev/null", *words])
        assert result.returncode == 0, result.stderr
    one, again, other, other_again = ids.read_text().splitlines()
    assert one == again != other == other_again


# The two engines, the launcher's rendezvous, and the baseline that does without us.
ENGINES = {
    "utils/distributed/ddp.py",
    "utils/distributed/horovod.py",
    "utils/launch/loopback/loopback.py",
    "bench/plain.py",
}


def test_no_engine_is_known_outside_the_folder_of_the_engines():
    """Messages may name an engine; code may not."""
    engine = re.compile(
        r"\bhvd\b|(import|from) (horovod|torch\.distributed)|torch\.distributed\.\w+\("
        r"|from torch import .*\bdistributed\b"
    )
    sources = [
        path
        for folder in ("models", "utils", "bench", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ]
    knowing = {
        str(path.relative_to(ROOT))
        for path in [*sources, *ROOT.glob("*.py")]
        if engine.search(path.read_text())
    }
    assert knowing == ENGINES
