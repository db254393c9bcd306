"""What must not stand in the source, and who may reach a job over the network."""

import ast
import os
import pickle
import re
import signal
import subprocess
import time
from base64 import b64encode
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from helpers.process import environment, kill, marked_processes
from utils.checkpoint import format as checkpoint
from utils.checkpoint import manager
from utils.files import ROOT
from utils.launch.commands import has_horovod

LAUNCHER = ROOT / "launcher.sh"
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]

# Runs code that stands in data, or a shell; or leaves a gap between a name and its file.
DANGEROUS = re.compile(
    r"(pickle|cPickle|cloudpickle|dill|marshal|shelve|joblib)\.(load|loads|open|_?Unpickler)"
    r"|(builtins\.)?(eval|exec)|os\.(system|popen)"
    r"|tempfile\.mktemp|yaml\.(load|load_all|full_load|unsafe_load)"
    r"|torch\.distributed\.checkpoint\..*|ssl\._create_unverified_context"
    r"|torch\.hub\.load_state_dict_from_url"
)

# The places where a word of it is right, each with its reason.
ALLOWED = {
    ("utils/data/cifar_archive.py", "pickle._Unpickler"),  # a subclass that builds arrays only
    ("utils/checkpoint/format.py", "torch.load without weights_only=True"),  # --trust-checkpoint
    ("tests/unit/data/test_cifar_archive.py", "pickle.loads"),  # of what the test has made
    (
        "tests/unit/data/test_cifar_archive.py",
        "os.system",
    ),  # payloads of hostile files, from here on
    ("tests/helpers/fuzzing.py", "os.system"),
    ("tests/helpers/fuzzing.py", "eval"),
}


def findings(source):
    """What is dangerous in Python source, by name."""
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    found = []
    for node in ast.walk(tree):
        name = _dotted(node, names)
        if DANGEROUS.fullmatch(name):
            found.append(name)
        if isinstance(node, ast.Call):
            found += _call(_dotted(node.func, names), node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += _text(node.value)
    return found


def _dotted(node, names):
    """``a.b.c`` with the module in place of the name that it was imported under, or ''."""
    if isinstance(node, ast.Attribute):
        start = _dotted(node.value, names)
        return f"{start}.{node.attr}" if start else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _call(name, node):
    given = {word.arg: word.value for word in node.keywords}
    values = {key: getattr(value, "value", None) for key, value in given.items()}
    if name == "torch.load" and values.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if values.get("shell") is True or ("shell" in given and "shell" not in values):
        yield "shell=True"
    if name == "numpy.load" and values.get("allow_pickle", False) is not False:
        yield "numpy.load with pickles"
    if getattr(node.func, "attr", "") == "extractall" and values.get("filter") not in (
        "data",
        "tar",
    ):
        yield "extractall without a filter"
    if values.get("verify") is False:
        yield "verify=False"


def _text(text):
    if re.search(r"(^|[^\w.-])/(tmp|var/tmp|dev/shm)/", text):
        yield "a predictable name in /tmp"
    if re.search(r"http://(?!127\.0\.0\.1[:/])[\w{]", text):
        yield "http:// without TLS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_python_file_does_what_is_dangerous(path):
    name = str(path.relative_to(ROOT))
    if path == Path(__file__):
        pytest.skip("holds the examples")
    assert [what for what in findings(path.read_text()) if (name, what) not in ALLOWED] == []


def test_every_exception_is_still_needed():
    for name, what in ALLOWED:
        assert what in findings((ROOT / name).read_text()), (name, what)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("import pickle as p\np.loads(x)", "pickle.loads"),
        ("from pickle import loads as read\nread(x)", "pickle.loads"),
        ("from pickle import Unpickler\nUnpickler(f).load()", "pickle.Unpickler"),
        ("import cloudpickle\nf = cloudpickle.loads", "cloudpickle.loads"),
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=x)", "torch.load without weights_only=True"),
        ("from torch import load\nload(p)", "torch.load without weights_only=True"),
        ("import yaml\nyaml.load(f)", "yaml.load"),
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load with pickles"),
        ("import tarfile\ntarfile.open(p).extractall(q)", "extractall without a filter"),
        ("p = '/tmp/cifar.lock'", "a predictable name in /tmp"),
        ("p = f'/tmp/{user}'", "a predictable name in /tmp"),
        ("u = 'http://www.cs.toronto.edu/'", "http:// without TLS"),
        ("from torch.distributed import checkpoint as d\nd.load(s)", "checkpoint.load"),
        ("import requests\nrequests.get(u, verify=False)", "verify=False"),
    ],
)
def test_the_check_finds_it(source, what):
    assert what in " ".join(findings(source))
    assert findings(source)


# In comments and messages these may stand; the patterns are for code.
SHELL = {
    r"\beval\s": "eval",
    r"\b(ba|da|z|k)?sh\s+-c\b": "a shell for a string",
    r"\b(curl|wget)\b": "a download beside pip",
    r"http://": "http:// without TLS",
    r"(^|[^\w}-])/(tmp|var/tmp)/": "a predictable name in /tmp",
    r"--trusted-host|--extra-index-url|--insecure|StrictHostKeyChecking=no": "a check turned off",
    r"\bchmod\s+[0-7]*[2367][0-7]?\b.*\$": "",
    r"(?<!\\)`": "a command in backticks",
    r"\bmktemp\s+-u|--dry-run.*mktemp": "a name without its file",
}
SCRIPTS = [*ROOT.glob("*.sh"), *ROOT.glob("[a-z]*/*.sh"), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_shell_script_does_what_is_dangerous(path):
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert "set -euo pipefail" in lines[:3]
    found = [
        (what, line)
        for line in lines
        for pattern, what in SHELL.items()
        if what and re.search(pattern, line)
    ]
    assert found == []


def listeners(processes):
    """The TCP sockets that some processes listen on: (process id, address in hex, port)."""
    inodes = {}
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
            except OSError:
                continue
            if found:
                inodes[found[1]] = process
    sockets = []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == LISTEN and fields[9] in inodes:
                sockets.append((inodes[fields[9]], address, int(port, 16)))
    return sockets


LISTEN = "0A"
# 127.0.0.0/8, ::1 and ::ffff:127.0.0.0/104 as the kernel writes them, words in its byte order.
LOOPBACK = re.compile(
    "[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F", re.ASCII | re.IGNORECASE
)


def command_of(process):
    """The command line of a process."""
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def exposed(processes):
    """Those that other machines can reach, with the command of each."""
    return [
        (command_of(process), port)
        for process, address, port in listeners(processes)
        if not LOOPBACK.fullmatch(address)
    ]


@pytest.fixture
def training(tmp_path):
    """Start two workers by launcher.sh and wait until they train; returns their processes."""
    before = marked_processes()
    started = []

    def start(engine, **variables):
        command = [
            LAUNCHER, "-m", "alexnet", "-n", "2", "-d", "synthetic10", "-f", engine, "--",
            "--train-size", "2000", "--test-size", "100", "-c", tmp_path / "run",
        ]  # fmt: skip
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        for line in process.stdout:
            if line.startswith("train loss"):  # of the first epoch: all connections are there
                return process, marked_processes() - before
        pytest.fail(process.stderr.read())

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            kill(marked_processes() - before)
            process.communicate()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "engine", ["dist", pytest.param("horovod", marks=[pytest.mark.slow, pytest.mark.horovod])]
)
def test_a_job_on_one_machine_is_not_for_others(training, engine):
    """Who can reach a rendezvous can take over the job."""
    if engine == "horovod" and not has_horovod():
        pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
    _, processes = training(engine)
    assert listeners(processes), "nothing was looked at"
    assert exposed(processes) == []


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stranger_at_the_store_runs_no_code(training, tmp_path):
    """torch's dynamic rendezvous would unpickle what anyone writes there; ours does not.

    The stranger writes under every name that is there, and under those of that rendezvous.
    """
    process, processes = training("dist")
    port = next(port for pid, _, port in listeners(processes) if "launch" in command_of(pid))
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    marker = tmp_path / "marker"
    known = store.list_keys()
    assert known
    text = b64encode(pickle.dumps(Payload(marker)))
    for key in ["torch.rendezvous.none", "torch.rendezvous." + "0" * 8, *known]:
        store.set(key, text)
        store.set(key + "/stranger", pickle.dumps(Payload(marker)))
    time.sleep(6)  # torch's agents look at that state every 5 seconds
    assert not marker.exists()
    assert process.poll() is None


def test_what_a_run_leaves_holds_no_secret_of_an_address(run_script, cifar10, tmp_path):
    """Neither its own, in whatever spelling, nor one that an older version has left in a file."""
    archive, md5 = cifar10
    folder = tmp_path / "run"
    archive.rename(tmp_path / "cifar-10-python.tar.gz")
    address = "https://me:SECRET@host/a.tar.gz?key=SECRET#SECRET"
    flags = ["-a", "alexnet", "-d", "cifar10", "--data", tmp_path, "--data-md5", md5, "-c", folder]

    def check(result):
        assert result.returncode == 0, result.stderr
        assert "SECRET" not in result.stdout + result.stderr
        assert "data_url" not in result.stdout
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert [name for name, content in contents.items() if b"SECRET" in content] == []
        assert contents["args.json"].count(b"https://host/a.tar.gz?...") >= 2  # command, options

    check(run_script([*flags, "--epochs", "1", "--data-url", address]))
    state = checkpoint.load(folder / checkpoint.LATEST)
    older = {name: state[name] for name in ("images", "workers")}
    for changes in ({"data_url": [address]}, {"data_url": [address], "lr": 3.0}):
        older["options"] = {**state["options"], **changes}
        state["earlier"] = [*state["earlier"], dict(older)]
    manager.save(folder, {**state, "options": state["earlier"][0]["options"]}, is_best=True)
    assert b"SECRET" in (folder / checkpoint.LATEST).read_bytes()
    resumed = [*flags, "--epochs", "3", f"--data-url={address}", "--resume", "auto"]
    check(run_script(resumed))
    assert len(checkpoint.load(folder / checkpoint.LATEST)["earlier"]) == 3
