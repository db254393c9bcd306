"""What only a GPU can show: pytest -m gpu, minutes on one GPU; -n 4 is quicker.

Most bodies run on the CPU too, on a few images, where they show that they run.
"""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_worker
from helpers.process import environment
from helpers.recorders import Replayer, Tape
from helpers.runs import same
from tools.commands import engine_command
from utils.checkpoint import format as checkpoint
from utils.config.recipes import Recipe
from utils.data import sampling, synthetic
from utils.data.datasets import load_dataset
from utils.data.image_set import ImageSet
from utils.data.sampling import PAD
from utils.distributed.comm import Comm
from utils.files import ROOT
from utils.metrics.plot import read_log
from utils.training import cuda_graph

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
CPU = pytest.param("cpu", marks=pytest.mark.slow)
# Fifty steps on a GPU, with a smaller last one in each epoch.
DATA = {
    "cuda": "-d synthetic10 --train-size 3100 --test-size 500",
    "cpu": "-d synthetic10 --train-size 70 --test-size 20 --train-batch 32",
}
# In fp32 proper and at a small rate, or the networks amplify differences in rounding.
TRAINING = "--epochs 2 --schedule 1 --lr 0.001 --tf32 off"
NEARLY = {"rel": 2e-3}
KEPT = {"CIFAR_KEEP_DDP": "1"}  # Or a job of one rank would be the serial engine.

FAMILIES = (
    "alexnet", "vgg11_bn", "resnet --depth 20", "preresnet --depth 20",
    "resnext --cardinality 2 --depth 11", "wrn --depth 10 --drop 0.3",
    "densenet --depth 22 --drop 0.1",
)  # fmt: skip


@pytest.fixture
def device(request):
    """The kind of device that the test's processes compute on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture
def train(run, device, tmp_path):
    """Run cifar.py into a folder; return it, what was printed, and the trace."""

    def start(name, network, *flags, script=(str(ROOT / "cifar.py"),), workers=None, fails=False,
              **changes):  # fmt: skip
        folder, trace = tmp_path / name, tmp_path / f"{name}.json"
        command = engine_command("dist" if workers else "serial", workers or 1, *script)
        words = f"{DATA[device]} {TRAINING} -a {network}".split()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else ""
        # Not every machine knows its own name.
        settings = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        result = run(
            [*command, *words, "-c", folder, "--trace", trace, *flags],
            env=environment(CUDA_VISIBLE_DEVICES=visible, **settings, **changes),
            timeout=200,
        )
        # Autograd warns so of a network that is trained on another stream than it was prepared on.
        assert "AccumulateGrad" not in result.stderr
        if fails:
            assert result.returncode != 0
            return folder, result.stdout, None
        assert result.returncode == 0, result.stdout + result.stderr
        assert "--estimate" in flags or f"device     {device}" in result.stdout
        record = json.loads(trace.read_text()) if trace.exists() else None
        return folder, result.stdout, record

    return start


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("device", "network"),
    [*(pytest.param("cuda", f, marks=pytest.mark.gpu) for f in FAMILIES),
     pytest.param("cpu", "wrn --depth 10 --drop 0.3", marks=pytest.mark.slow)],
    indirect=["device"],
)  # fmt: skip
def test_graph_and_eager_train_the_same(train, device, network):
    traces = []
    for choice in ("on", "off"):
        _, printed, trace = train(choice, network, "--graph", choice)
        assert device == "cpu" or "warning: --graph" not in printed
        traces.append(trace)
    assert len(traces[0]["loss"]) == (50 if device == "cuda" else 6)
    assert traces[0]["loss"] == pytest.approx(traces[1]["loss"], **NEARLY)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA], indirect=True)
def test_bf16_learns_as_fp32_does(train, device):
    logs = [
        read_log(train(amp, "resnet --depth 20", "--amp", amp, "--lr", "0.02")[0] / "log.txt")
        for amp in ("off", "bf16")
    ]
    assert logs[1]["Train Loss"] == pytest.approx(logs[0]["Train Loss"], rel=0.05)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_deterministic_runs_are_the_same_bits_also_when_killed_inside_an_epoch(train, device):
    """The network's step runs in Python as often as it is not replayed: a graph's fifth is the
    smaller last step of the first epoch, and steps 10 and 20 have been saved by then."""
    every, kill_at = ("10", 4) if device == "cuda" else ("2", 2)
    network = "wrn --depth 10 --drop 0.3"
    flags = ("--deterministic", "--save-every", every)
    one, *_ = train("one", network, *flags)
    two, *_ = train("two", network, *flags)
    killed, *_ = train("killed", network, *flags, script=with_fault(f"kill-{kill_at}"), fails=True)
    state = checkpoint.load(killed / checkpoint.LATEST)
    assert (state["epoch"], state["step"]) == (0, 20 if device == "cuda" else 2)
    _, printed, _ = train("killed", network, *flags, "--resume", "auto")
    assert "after epoch 0, step" in printed
    same(one, two)
    same(one, killed)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_one_launched_worker_trains_what_the_serial_engine_trains(train, device):
    """NCCL with one rank, eagerly and with the all-reduce inside the graph."""
    network = "resnet --depth 20"
    _, _, wanted = train("serial", network, "--graph", "off")
    for choice in ("off", "on"):
        flags = ("--graph", choice)
        _, printed, trace = train(f"dist-{choice}", network, *flags, workers=1, **KEPT)
        assert f"DistributedDataParallel, {'nccl' if device == 'cuda' else 'gloo'}" in printed
        assert device == "cpu" or "warning: --graph" not in printed
        assert trace["loss"] == pytest.approx(wanted["loss"], **NEARLY)


def with_fault(fault):
    return str(ROOT / "tools" / "fault_injection.py"), fault, "cifar"


# A step of Python beside the graph: warm-up and recording are numbers 0 to 3, or 0 to 11 with NCCL.
TAIL = {"cuda": "nan-4", "cpu": "nan-2"}
TERM = {"cuda": "term-12", "cpu": "term-2"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_a_run_goes_back_to_a_checkpoint_and_on_under_the_same_graph(train, device):
    """The smaller last batch is spoilt: the graph goes on with what has been put into its place."""
    every = {"cuda": "10", "cpu": "1"}[device]
    flags = ("--on-nan", "rewind", "--save-every", every, "--graph", "on")
    folder, printed, _ = train("run", "resnet --depth 20", *flags, script=with_fault(TAIL[device]))
    assert printed.count("going back to") == 1
    losses = read_log(folder / "log.txt")["Train Loss"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_an_interrupted_run_with_nccl_in_its_graph_ends(train, device):
    """NCCL of several ranks would wait for a graph that refers to it; one rank shows only that it
    ends."""
    flags = ("--graph", "on", "--save-every", "1")
    workers = min(2, max(1, torch.cuda.device_count()))
    folder, printed, _ = train("run", "resnet --depth 20", *flags, script=with_fault(TERM[device]),
                               workers=workers, fails=True, **KEPT)  # fmt: skip
    assert "interrupted after epoch 0, step" in printed
    assert checkpoint.load(folder / checkpoint.LATEST)["epoch"] == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_two_workers_on_one_gpu_train_what_one_trains(train, device):
    """Gloo: NCCL refuses a GPU that two ranks share. CIFAR_SHARE_GPU allows it."""
    _, _, wanted = train("serial", "alexnet")
    _, printed, trace = train("two", "alexnet", workers=2, CIFAR_SHARE_GPU="1")
    assert "workers    2 (DistributedDataParallel, gloo)" in printed
    assert trace["loss"] == pytest.approx(wanted["loss"], **NEARLY)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_the_memory_that_a_run_takes_is_near_the_estimate(train, device):
    """Within a factor of two: work space of the convolutions and the images come on top."""
    network = "resnet --depth 110" if device == "cuda" else "resnet --depth 8"
    _, printed, _ = train("estimate", network, "--estimate")
    number, unit = re.search(r"memory +about ([\d.,]+) (\wiB) per worker", printed).groups()
    estimate = float(number.replace(",", "")) * {"MiB": 2**20, "GiB": 2**30}[unit]
    _, _, trace = train("run", network)
    if device == "cuda":
        assert 0.5 * estimate < trace["peak_memory"] < 2 * estimate
    else:
        assert trace["peak_memory"] == 0


@pytest.mark.parametrize("device", [CUDA, "cpu"], indirect=True)
def test_batches_are_the_same_bits_wherever_the_images_live(device):
    made = []
    for on_device in (True, False):
        images = ImageSet(
            *synthetic.generate(10, train=True, count=300), *synthetic.STATISTICS,
            device=torch.device(device), on_device=on_device, pad=PAD,
        )  # fmt: skip
        storage = images.storage_device
        assert storage.type == (device if on_device else "cpu")
        index = torch.from_numpy(sampling.permutation(300, 0, 0)).to(storage)
        draws = torch.from_numpy(sampling.crops_and_flips(300, 0, 0, PAD)).to(storage)
        # All batches are on their way before the first is looked at.
        made.append([images.batch(part, draws) for part in index.split(32)])
    for (batch, labels), (other, others) in zip(*made, strict=True):
        assert batch.device.type == other.device.type == device
        assert torch.equal(batch, other)
        assert torch.equal(labels, others)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_a_run_is_the_same_bits_wherever_the_images_live(train, device):
    flags = ("--deterministic", "--graph", "off")
    folders = []
    for choice in ("on", "off"):
        folder, printed, _ = train(choice, "alexnet", *flags, "--resident", choice)
        assert ("stay in main memory" in printed) == (device == "cuda" and choice == "off")
        folders.append(folder)
    same(*folders)


# A network whose forward pass reads a number back, which no capture permits, and drops values,
# because what a failed capture leaves behind shows in the random generator first.
SYNCHRONISING = """
import sys
from torch import nn
from torch.nn import functional
from cifar import run
from models._registry import register
from utils.distributed.ddp import DDPComm
from utils.runtime.exit_codes import exit_process, run_worker

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classifier = nn.Linear(3 * 32 * 32, classes)

    def forward(self, x):
        x = functional.dropout(x, 0.2, self.training)
        return self.classifier(x.flatten(1)) * (1 if x.abs().sum().item() > 0 else 2)

@register("synchronising")
def synchronising(num_classes=10):
    return Net(num_classes)

exit_process(run_worker(DDPComm, run, sys.argv[1:]))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("device", [CUDA, CPU], indirect=True)
def test_where_the_capture_fails_the_run_goes_on(train, device):
    program = ("-c", SYNCHRONISING)
    folder, printed, trace = train("on", "synchronising", "--graph", "on", script=program)
    if device == "cuda":
        assert printed.count("warning: --graph: the step cannot be captured") == 1
    _, _, wanted = train("off", "synchronising", "--graph", "off", script=program)
    assert trace["loss"] == pytest.approx(wanted["loss"], **NEARLY)
    assert len(read_log(folder / "log.txt")["Train Loss"]) == 2


# bench/gpu.sh: everything but the device.

FEW = "0.001"  # of the images
MODES = [("resnet20", ["fp32 graph", "fp32"]),
         pytest.param("alexnet", ["fp32 graph", "fp32", "plain", "script fp32"],
                      marks=[pytest.mark.slow, pytest.mark.timeout(300)])]  # fmt: skip


@pytest.mark.parametrize(("model", "variants"), MODES)
def test_the_benchmark_measures_every_variant(monkeypatch, tmp_path, capsys, model, variants):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)  # Of the process that measures.
    flags = ["--device", "cpu", "--scale", FEW, "--only", model, "--loaders", "1"]
    gpu.run(gpu.parse([*flags, "-o", str(tmp_path)]))
    found = json.loads((tmp_path / "gpu.json").read_text())["arms"]
    assert [record["arm"] for record in found] == variants
    assert not [record["error"] for record in found if "error" in record]
    assert (found[0]["steps"], found[0]["of_steps"]) == (1, 1)
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert re.findall(rf"^{model} +(.*?)  ", table, re.M) == [
        "plain, 1 loaders" if variant == "plain" else variant for variant in variants
    ]


def test_variants_that_do_not_fit_are_named_and_written(tmp_path, capsys):
    flags = ["--device", "cpu", "--only", "resnet20,alexnet", "--budget", "1"]
    gpu.run(gpu.parse([*flags, "-o", str(tmp_path)]))
    found = json.loads((tmp_path / "gpu.json").read_text())["arms"]
    assert [(record["model"], record["error"]) for record in found] == [
        *[("resnet20", "did not fit into the time")] * 2,
        *[("alexnet", "did not fit into the time")] * 4,
    ]
    # Each is named as it comes, and in the table.
    assert capsys.readouterr().out.count("did not fit into the time") == 12


@pytest.mark.slow
def test_a_variant_that_fails_costs_no_other(tmp_path):
    """A process ends over the first; another one measures the rest."""
    options = gpu.parse(["--device", "cpu", "--scale", FEW])
    jobs = [gpu.Job("no-such-model", "fp32"), gpu.Job("resnet20", "fp32")]
    first, second = gpu.measure_all(jobs, options)
    assert first["error"] == "the process has failed"
    assert second["epoch"] > 0


def test_the_table_of_the_benchmark():
    known = {"start": 2.0, "first": 3.0, "steps": 9, "of_steps": 9, "images_per_second": 1e6,
             "peak_memory": 3 * 2**30}  # fmt: skip
    (row,) = gpu.rows_of(
        {"model": "alexnet", "arm": "bf16 graph", "epoch": 0.06, "capture": 0.5, **known}, (5, 1)
    )
    assert row == ("alexnet", "bf16 graph", "0.060", "<= 0.1", "3.0", "2.0", "0.5", "1,000,000",
                   "50%", "3.0", "-", "-")  # fmt: skip
    (row,) = gpu.rows_of(
        {"model": "vgg16", "arm": "bf16", "epoch": 8.0, **known, "steps": 3}, (5, 1)
    )
    assert row[2:4] == ("~8.000", "-")
    (row,) = gpu.rows_of(
        {"model": "resnet110", "arm": "plain", "images": 50,
         "seconds": {"ours": [1.0, 2.0], "plain, 4 loaders": [4.0, 6.0]}}, (200, 40),
    )  # fmt: skip
    assert row[1:3] == ("plain, 4 loaders", "~20.000")
    assert row[-2:] == ("3.50 (3.00 - 4.00)", ">= 3")


def test_idle_time_is_what_no_kernel_covers():
    assert gpu_worker.idle([(0, 1), (4, 5), (0.5, 2), (4.2, 4.4)]) == pytest.approx(2 / 5)
    assert gpu_worker.idle([(3, 4)]) == 0
    assert gpu_worker.idle([]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--only", "alexnt"], "alexnet"), (["--budget", "0"], "--budget"), (["--loaders", "x"], "x"),
     (["--nonsense"], "--nonsense")],
)  # fmt: skip
def test_bad_input_of_the_benchmark_is_one_line(capsys, flags, words):
    assert gpu.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(run, tmp_path):
    result = run([ROOT / "bench" / "gpu.sh", "-o", tmp_path / "new"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: no GPU: PyTorch sees none here; run this on a machine that has one\n"
    )
    assert list(tmp_path.iterdir()) == []


TINY = Recipe("tiny", ("-a", "resnet", "--depth", "8", "--train-batch", "10"), 0, "-", "-")


def test_the_benchmark_trains_with_a_graph(monkeypatch):
    """As on a GPU, except that what is recorded is done again by Python."""
    data = load_dataset("synthetic10", "data", train_size=70, test_size=20)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", Replayer)
    found = gpu_worker.measure_training(TINY, data, ["fp32", "graph"], Comm())
    assert found["capture"] == 1.5
    assert (found["steps"], found["of_steps"]) == (7, 7)
    assert found["warnings"] == []


class Failing(Replayer):
    """Cannot record."""

    def record(self, work):
        raise RuntimeError("not permitted\nmore")


def test_the_benchmark_says_why_there_is_no_graph(monkeypatch):
    data = load_dataset("synthetic10", "data", train_size=70, test_size=20)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", Failing)
    found = gpu_worker.measure_training(TINY, data, ["fp32", "graph"], Comm())
    assert found["warnings"] == ["the step cannot be captured (not permitted)"]
    assert found["epoch"] > 0


def test_one_process_profiles_several_variants_with_graphs_between_them(monkeypatch):
    """Whose process keeps CUPTI, which may not start again beside a graph."""
    data = load_dataset("synthetic10", "data", train_size=70, test_size=20)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", Tape)
    for words in (["fp32", "graph"], ["fp32"], ["fp32", "graph"]):
        found = gpu_worker.measure_kernels(TINY, data, words, Comm())
        assert found["steps"] == 7
        assert found["kernels"]
    worker = gpu.Worker([], gpu.parse(["--device", "cpu"]))
    try:
        environ = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
        assert b"TEARDOWN_CUPTI=0" in environ
    finally:
        worker.end()
