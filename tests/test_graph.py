"""The captured step: what of it needs no GPU; test_gpu.py has the rest."""

import pytest
import torch

from models import create_model
from utils import checkpoint, order, synthetic
from utils.augment import ImageSet
from utils.comm import Comm, Exchange
from utils.graph import StepGraph, wants_graph
from utils.metrics import Meter
from utils.optim import build_optimizer, set_learning_rate
from utils.startup import PAD
from utils.step import Step

BATCH, COUNT = 8, 44  # five batches and a rest of four


class Replayer:
    """Stands in for CUDA: what it "records" is done again by Python. Like a graph it reads the
    tensors that it has seen while recording, so whatever does not stay at its place shows."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[str] = []
        self.fails = fails

    def warm_up(self, work):
        self.calls.append("warm-up")
        work()

    def record(self, work):
        self.calls.append("record")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay():
            self.calls.append("replay")
            work()

        return replay


def train(recorder, lines=None):
    """Two epochs of a network with dropout and batch norm; returns weights, rates and sums."""
    torch.manual_seed(0)
    comm = Comm()
    model = create_model("wrn", depth=10, widen_factor=1, drop=0.3)
    rate = torch.tensor(0.1, dtype=torch.float64) if recorder else 0.1
    optimizer = build_optimizer(model, rate, 0.9, 5e-4, False)
    optimizer.param_groups[0]["fused"] = False  # the CPU's fused kernel takes no tensor for a rate
    step = Step(comm, *comm.wrap(model, optimizer, Exchange()), "off")
    images = ImageSet(
        *synthetic.generate(10, train=True, count=COUNT), *synthetic.STATISTICS,
        device=torch.device("cpu"), pad=PAD,
    )  # fmt: skip
    meter = Meter(comm.device)
    graph = None
    if recorder:
        say = [].append if lines is None else lines.append
        graph = StepGraph(step, images, meter, BATCH, BATCH, 3, recorder, say)
    sums = []
    for epoch in range(2):
        meter.start_from([], Comm())
        sequence = torch.from_numpy(order.permutation(COUNT, 0, epoch))
        augmentation = torch.from_numpy(order.crops_and_flips(COUNT, 0, epoch, PAD))
        for k, (start, stop) in enumerate(order.batches(COUNT, BATCH, 1)):
            index, seed = sequence[start:stop], order.step_seed(0, epoch, k)
            set_learning_rate(optimizer, 0.1 / (1 + k))
            if graph and graph.takes(len(index), stop - start):
                graph(index, augmentation, seed)
            else:
                batch, labels = images.batch(index, augmentation)
                loss, output = step(batch, labels, stop - start, seed)
                meter.update(loss, output, labels)
        sums.append(meter.sums.clone())
    return model.state_dict(), sums


def test_a_recorded_step_trains_what_the_plain_step_trains():
    """Order, crops, dropout, learning rate and the smaller last batch included."""
    recorder = Replayer()
    state, sums = train(recorder)
    wanted, wanted_sums = train(None)
    assert recorder.calls == ["warm-up"] * 3 + ["record"] + ["replay"] * 7
    for name, tensor in wanted.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-7), name
    for one, other in zip(sums, wanted_sums, strict=True):
        assert torch.allclose(one, other, rtol=1e-6)
        assert int(one[3]) == COUNT


def test_where_recording_fails_training_goes_on_and_says_so_once():
    lines: list[str] = []
    recorder = Replayer(fails=True)
    state, _ = train(recorder, lines)
    wanted, _ = train(None)
    assert recorder.calls == ["warm-up"] * 3 + ["record"]
    (line,) = lines
    assert "operation not permitted when stream is capturing)" in line
    for name, tensor in wanted.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-7), name


def test_a_graph_is_not_wanted_where_it_cannot_work():
    comm = Comm()
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    comm.device = cpu
    assert wants_graph("auto", comm, 1, cpu, "stop") == (False, "")
    assert wants_graph("on", comm, 1, cpu, "stop") == (False, "it needs a GPU")
    comm.device = gpu
    assert wants_graph("auto", comm, 1, gpu, "stop") == (True, "")
    assert wants_graph("off", comm, 1, gpu, "stop") == (False, "")
    assert wants_graph("auto", comm, 1, cpu, "stop") == (False, "")
    assert "--resident" in wants_graph("on", comm, 1, cpu, "stop")[1]
    assert "--on-nan" in wants_graph("on", comm, 1, gpu, "skip")[1]
    assert not wants_graph("on", comm, 2, gpu, "stop")[0]
    comm.size = 2
    assert wants_graph("auto", comm, 1, gpu, "stop") == (False, "")
    assert wants_graph("on", comm, 1, gpu, "stop") == (True, "")
    comm.graph_warm_up = 0
    assert "captured" in wants_graph("on", comm, 1, gpu, "stop")[1]


def test_the_rate_is_a_number_in_every_checkpoint():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), torch.tensor(0.25), 0.9, 0, False)
    state = checkpoint._with_plain_rate(optimizer.state_dict())
    assert [type(group["lr"]) for group in state["param_groups"]] == [float]


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
