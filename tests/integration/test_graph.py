"""Training under a CUDA graph, with stand-ins on the CPU; test_gpu.py has what needs a GPU."""

import json
import re
import sys

import pytest
import torch

from helpers.process import run
from helpers.runs import COMMON, MODELS, same
from helpers.warm import run_warm
from tools.commands import engine_command
from utils.checkpoint import format as checkpoint
from utils.config.args import parse_args
from utils.files import ROOT

SYNC = parse_args([]).gradient_sync


@pytest.fixture
def recorded(tmp_path):
    """Train in small with a stand-in for graphs; returns the folder, the trace and what is said."""

    def start(name, kind="tape", faults="none", model="wrn with dropout", workers=1, code=0,
              more=("--graph", "on"), restarts=None):  # fmt: skip
        folder, trace = tmp_path / name, tmp_path / f"{name}.json"
        script = [str(ROOT / "tests" / "helpers" / "recorders.py"), kind, faults, "cifar"]
        flags = [*COMMON, *MODELS[model], "-c", folder, "--trace", trace, *more]
        if restarts is None:
            result = run_warm([*script, *flags], workers)
        else:
            words = engine_command("dist", workers, *script)
            supervisor = ROOT / "utils" / "launch" / "supervisor.py"
            supervise = [sys.executable, supervisor, "--max-restarts", restarts, "--"]
            result = run([*supervise, *words, *flags])
        assert result.returncode == code, result.stdout + result.stderr
        losses = json.loads(trace.read_text())["loss"] if trace.exists() else None
        return folder, losses, result.stdout + result.stderr

    return start


EAGER = ("--graph", "off")
PRECISE = ("--dtype", "float64", "--graph")
# Two epochs of six whole batches and a smaller one: three steps of warm-up, nine replays.
CLOSING = "closing: 9 replays, 0 recordings alive; enter prepare record drop leave\n"


def test_a_recorded_run_is_the_eager_run(recorded):
    """Bit for bit, with tail batches, evaluations and saves; nothing has been moved meanwhile."""
    folder, losses, said = recorded("tape")
    eager, wanted, _ = recorded("eager", more=EAGER)
    assert said.count(CLOSING) == 1
    assert losses == wanted
    same(folder, eager)


def test_all_of_a_run_happens_on_the_stream_that_is_captured(recorded):
    """From before the network is wrapped to after the graph is gone; an eager run has no other."""
    for workers in (1, 2):
        for choice, calls in (("on", "enter prepare record drop leave"), ("off", "prepare")):
            _, _, said = recorded(
                f"{workers}-{choice}", "replayer", workers=workers, more=("--graph", choice)
            )
            assert said.count(f" recordings alive; {calls}\n") == 2 * workers


def test_a_trace_in_double_precision_has_the_loss_of_each_step(recorded):
    """A recording writes every loss into the same place; the rate is float32 in it, as on a GPU."""
    _, losses, _ = recorded("tape", more=(*PRECISE, "on"))
    _, wanted, _ = recorded("eager", more=(*PRECISE, "off"))
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("kill_at", [4, 5])
def test_a_killed_run_goes_on_under_a_graph(recorded, kill_at):
    """Python trains in the warm-up, in the recording (number 3) and in the tails (4 and 5)."""
    more = ("--graph", "on", "--resume", "auto")
    one, *_ = recorded("one")
    other, *_ = recorded("other", faults=f"kill-{kill_at}", code=-9)
    _, _, said = recorded("other", more=more)
    assert "after epoch" in said
    same(one, other)


@pytest.mark.parametrize(("kind", "workers"), [("tape", 1), ("replayer", 1), ("replayer", 2)])
def test_going_back_to_a_checkpoint_leaves_everything_in_its_place(recorded, kind, workers):
    """The smaller last batch of the first epoch is spoilt, and the recording goes on afterwards."""
    step = 4 if kind == "tape" else 6  # the replayer's replays are steps of Python, too
    more = ("--on-nan", "rewind", "--graph")
    folder, _, said = recorded("graph", kind, f"nan-{step}", workers=workers, more=(*more, "on"))
    assert said.count("going back to") == 1
    assert said.count(CLOSING) == workers
    eager, _, said = recorded("eager", kind, "nan-6", workers=workers, more=(*more, "off"))
    assert said.count("going back to") == 1
    same(folder, eager)


@pytest.mark.parametrize(
    ("faults", "more", "code", "words"),
    [
        ("term-4", (), 75, "interrupted after epoch 0, step"),
        ("raise-5", (), 1, "RuntimeError: planted"),  # which closes nothing: others may not know
        ("nan-4", ("--on-nan", "stop"), 3, "the loss or gradient is not finite"),
        ("nan-4", ("--on-nan", "rewind", "--save-every", "100"), 3, "not finite"),
        ("int-4", (), 75, "interrupted after"),
    ],
)  # fmt: skip
def test_the_recording_is_gone_before_the_engine_closes(recorded, faults, more, code, words):
    """Whatever ends the run: NCCL would wait for a graph without end."""
    _, _, said = recorded("run", faults=faults, code=code, more=("--graph", "on", *more))
    assert words in said
    assert said.count("closing: ") == (code != 1)
    reports = [line for line in said.splitlines() if " recordings alive" in line]
    wanted = re.compile(r"\w+: [1-9]\d* replays, 0 recordings alive; enter prepare record drop")
    assert all(map(wanted.fullmatch, reports)), reports


@pytest.mark.parametrize("kind", ["unable", "unable-forward"])
def test_where_one_rank_cannot_record_all_go_on_without_and_it_is_named(recorded, kind):
    """Two Gloo ranks; a pass of one breaks off half-way, and the next one works."""
    wanted, losses, _ = recorded("eager", "replayer", workers=2, more=EAGER)
    folder, found, said = recorded("unable", kind, workers=2)
    warned = [line for line in said.splitlines() if "warning: --graph" in line]
    assert warned == [
        "warning: --graph: the step cannot be captured on rank 1 (operation not permitted when "
        "stream is capturing); going on without"
    ]
    assert said.count("closing: 0 replays, 0 recordings alive") == 2
    assert found == losses
    same(wanted, folder)


def test_two_workers_train_under_a_graph_what_they_train_without(recorded):
    wanted, losses, _ = recorded("eager", "replayer", workers=2, more=EAGER)
    folder, found, said = recorded("graph", "replayer", workers=2)
    assert said.count(CLOSING) == 2
    assert found == losses
    same(wanted, folder)


def test_a_worker_whose_peer_is_lost_under_a_graph_ends_and_the_job_goes_on(recorded):
    """Killed in the middle of the replays; the other closes nothing, which NCCL would wait for."""
    wanted, *_ = recorded("eager", "replayer", workers=2, more=EAGER)
    folder, _, said = recorded("lost", "replayer", "kill-one-9", workers=2, restarts=1)
    assert said.count("closing: ") == 2  # both of the second try
    same(wanted, folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("network", ["alexnet", "resnet --depth 8"])
def test_a_compiled_network_trains_the_same_and_keeps_its_names(run_script, tmp_path, network):
    flags = "-d synthetic10 --train-size 300 --test-size 100 --epochs 1 --schedule 0 --lr 0.01"
    states = []
    for more in ([], ["--compile"]):
        folder = tmp_path / f"run{len(more)}"
        words = [*flags.split(), "-a", *network.split(), "-c", str(folder), *more]
        result = run_script(words, timeout=300)
        assert result.returncode == 0, result.stderr
        states.append(checkpoint.load(folder / checkpoint.LATEST)["state_dict"])
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], rtol=1e-3, atol=1e-4), name
