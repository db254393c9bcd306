"""The captured step, in the process of the test: stand-ins for CUDA graphs on the CPU."""

import copy
import itertools
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from helpers.recorders import Replayer, Tape
from models import create_model
from utils.checkpoint.manager import with_plain_rate
from utils.checkpoint.restore import load_optimizer
from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.data import sampling, synthetic
from utils.data.image_set import ImageSet
from utils.data.sampling import PAD
from utils.distributed.comm import Comm
from utils.distributed.signals import SignalHandler
from utils.launch.heartbeat import Heartbeat
from utils.metrics.meter import Meter
from utils.runtime.device import seed_generators
from utils.training.cuda_graph import CudaRecorder, StepGraph, resolve_cuda_graph
from utils.training.loop import TrainLoop
from utils.training.optim import build_optimizer, set_learning_rate
from utils.training.plan import EpochPlan
from utils.training.step import Step

BATCH, COUNT = 8, 44  # five batches and a rest of four

SYNC = parse_args([]).gradient_sync


def synthetic_images():
    return ImageSet(
        *synthetic.generate(10, train=True, count=COUNT), *synthetic.STATISTICS,
        device=torch.device("cpu"), pad=PAD,
    )  # fmt: skip


@contextmanager
def stepper(recorder):
    """A StepGraph, or None without a recorder, and a function that trains so many steps.

    The network has dropout and batch norm; each epoch ends with a smaller batch. The function
    returns weights, and the sums of every epoch.
    """
    torch.manual_seed(0)
    comm = Comm()
    model = create_model("wrn", depth=10, widen_factor=1, drop=0.3)
    rate = torch.tensor(0.1) if recorder else 0.1
    optimizer = build_optimizer(model, rate, 0.9, 5e-4, False)
    step = Step(comm, *comm.prepare(model, optimizer, SYNC), "off")
    images = synthetic_images()
    meter = Meter(comm.device)
    graph = None
    if recorder:
        graph = StepGraph(step, images, meter, BATCH, BATCH, 3, recorder)
    slices = sampling.batch_slices(COUNT, BATCH, 1)
    sums, done = [], itertools.count()

    def draws(epoch):
        yield torch.from_numpy(sampling.permutation(COUNT, 0, epoch))
        yield torch.from_numpy(sampling.crops_and_flips(COUNT, 0, epoch, PAD))

    epochs = [tuple(draws(epoch)) for epoch in range(2)]

    def trained(steps):
        for number in itertools.islice(done, steps):
            epoch, k = divmod(number, len(slices))
            if k == 0:
                meter.start_from([], comm)
            sequence, augmentation = epochs[epoch % 2]
            start, stop = slices[k]
            index, seed = sequence[start:stop], sampling.step_seed(0, epoch, k)
            set_learning_rate(optimizer, 0.1 / (1 + k))
            if graph and graph.takes(len(index), stop - start):
                graph(index, augmentation, seed)
            else:
                batch, labels = images.batch(index, augmentation)
                loss, output = step(batch, labels, stop - start, seed)
                meter.update(loss, output, labels)
            if k == len(slices) - 1:
                sums.append(meter.sums.clone())
        return model.state_dict(), sums

    try:
        yield graph, trained
    finally:
        if graph:
            graph.drop()


def train(recorder):
    """Two epochs: weights and sums."""
    with stepper(recorder) as (_, trained):
        return trained(12)


@pytest.mark.parametrize("kind", [Replayer, Tape])
def test_a_recorded_step_trains_what_the_plain_step_trains(kind):
    """Order, crops, dropout, learning rate and the smaller last batch included."""
    recorder = kind()
    state, sums = train(recorder)
    wanted, wanted_sums = train(None)
    assert recorder.calls == ["record"] + ["replay"] * 7 + ["drop"]
    for name, tensor in wanted.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-7), name
    for one, other in zip(sums, wanted_sums, strict=True):
        assert torch.allclose(one, other, rtol=1e-6)
        assert int(one[3]) == COUNT


def test_where_recording_fails_training_continues_and_warns_once(capsys):
    class Failing(Replayer):
        def record(self, work):
            try:
                raise RuntimeError("operation not permitted \x1b when stream is capturing\nmore")
            finally:
                raise RuntimeError("the capture was invalidated")

    recorder = Failing()
    state, _ = train(recorder)
    (line,) = capsys.readouterr().out.splitlines()
    wanted, _ = train(None)
    assert recorder.calls == ["drop", "drop"]
    assert line.startswith("warning: --graph: the step cannot be captured (")
    assert "operation not permitted \\x1b when stream is capturing)" in line
    for name, tensor in wanted.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-7), name


def test_a_graph_is_not_wanted_where_it_cannot_work():
    comm = Comm()
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    comm.device = cpu
    assert resolve_cuda_graph("auto", comm, 1, cpu, "stop", False) == (False, "")
    assert resolve_cuda_graph("on", comm, 1, cpu, "stop", False) == (False, "it needs a GPU")
    comm.device = gpu
    assert resolve_cuda_graph("auto", comm, 1, gpu, "stop", False) == (True, "")
    assert resolve_cuda_graph("off", comm, 1, gpu, "stop", False) == (False, "")
    assert resolve_cuda_graph("auto", comm, 1, cpu, "stop", False) == (False, "")
    assert "--resident" in resolve_cuda_graph("on", comm, 1, cpu, "stop", False)[1]
    assert "--on-nan" in resolve_cuda_graph("on", comm, 1, gpu, "skip", False)[1]
    assert "--drop" in resolve_cuda_graph("on", comm, 1, gpu, "stop", True)[1]
    assert not resolve_cuda_graph("on", comm, 2, gpu, "stop", False)[0]
    comm.world_size = 2
    assert resolve_cuda_graph("auto", comm, 1, gpu, "stop", False) == (False, "")
    assert resolve_cuda_graph("on", comm, 1, gpu, "stop", False) == (True, "")
    comm.graph_warm_up_steps = 0
    assert "captured" in resolve_cuda_graph("on", comm, 1, gpu, "stop", False)[1]


def test_the_rate_is_a_number_in_every_checkpoint():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), torch.tensor(0.25), 0.9, 0, False)
    state = with_plain_rate(optimizer.state_dict())
    assert [type(group["lr"]) for group in state["param_groups"]] == [float]


def test_a_recording_that_fails_is_dropped_while_its_traceback_lives():
    """The traceback may keep the recording; the recorder destroys what is in it."""

    class Failing(Replayer):
        def _replay_of(self, work):
            def fail():
                raise RuntimeError("planted")

            return fail

    recorder = Failing()
    with pytest.raises(RuntimeError, match="planted"):  # noqa: SIM117
        with stepper(recorder) as (graph, trained):
            trained(5)
    assert recorder.calls[-1] == "drop"
    assert graph._replay is None


class Cuda:
    """The part of torch.cuda that a recorder uses, on a machine that has none."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.current = "default"
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        generator = SimpleNamespace(
            clone_state=lambda: "clone",
            graphsafe_set_state=lambda state: self.calls.append(f"generator gets its {state}"),
        )
        monkeypatch.setattr(torch.cuda, "default_generators", [None, generator])
        for name in ("endAllocateToPool", "releasePool"):
            monkeypatch.setattr(
                torch._C, f"_cuda_{name}", partial(self._close, name), raising=False
            )
        self.pool_is_closed = False

    def _close(self, name, device, pool):
        if self.pool_is_closed:
            raise RuntimeError("not currently recording")
        self.calls.append(f"{name} {device} {pool}")

    def _Stream(self, device):
        return SimpleNamespace(
            device=device, device_index=device.index,
            wait_stream=lambda other: self.calls.append(f"side waits for {other}"),
        )  # fmt: skip

    def _current_stream(self, device):
        return SimpleNamespace(
            wait_stream=lambda other: self.calls.append("default waits for side")
        )

    @contextmanager
    def _stream(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def _CUDAGraph(self):
        names = ("replay", "reset")
        return SimpleNamespace(**{name: partial(self.calls.append, name) for name in names})

    @contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode):
        assert stream is self.current
        self.calls.append(f"capture into {pool}, {capture_error_mode}")
        yield


class TestCudaRecorder:
    """What it asks of CUDA. Whether CUDA then does it is for test_gpu.py."""

    def test_all_happens_on_one_stream_and_the_graph_is_destroyed(self, monkeypatch):
        cuda = Cuda(monkeypatch)
        recorder = CudaRecorder(torch.device("cuda", 1))
        with recorder.on_stream():
            assert cuda.current is recorder.stream
            replay = recorder.record(lambda: cuda.calls.append("work"))
            replay()
        assert cuda.current == "default"
        assert recorder.seconds > 0
        recorder.drop()
        recorder.drop()  # once is enough
        waits, *rest = cuda.calls
        assert waits.startswith("side waits for")
        assert rest == [
            "capture into (0, 7), thread_local", "work", "replay", "default waits for side", "reset"
        ]  # fmt: skip

    @pytest.mark.parametrize("closed", [False, True])
    def test_after_a_capture_that_fails_nothing_is_left_open(self, monkeypatch, closed):
        cuda = Cuda(monkeypatch)
        cuda.pool_is_closed = closed  # as by newer versions of torch
        recorder = CudaRecorder(torch.device("cuda", 1))

        def fail():
            raise RuntimeError("planted")

        with pytest.raises(RuntimeError, match="planted"), recorder.on_stream():
            recorder.record(fail)
        recorder.drop()
        mended = [] if closed else ["endAllocateToPool 1 (0, 7)", "releasePool 1 (0, 7)"]
        assert cuda.calls[2:] == ["generator gets its clone", *mended, "reset"]


class TestOfTheHost:
    """What a replayed step costs the host, which a fast GPU waits for."""

    def test_only_generators_in_use_are_seeded(self, monkeypatch):
        torch.manual_seed(7)
        wanted = torch.rand(3)
        with stepper(Replayer()) as (_, trained):
            monkeypatch.setattr(torch, "manual_seed", None)  # it goes through every back end
            trained(6)
            seed_generators(7, torch.device("cpu"))
            assert torch.equal(torch.rand(3), wanted)

    def test_a_replayed_step_costs_less_than_seeding_every_back_end(self):
        """Which each step once did. The best of many turns counts, since the machine is shared.

        ``pytest tests/unit/training/test_cuda_graph.py -k TestOfTheHost -s`` shows the figures.
        """

        class Empty(Replayer):
            def record(self, work):
                return lambda: None

        def best(work, count=1):
            turns = []
            for _ in range(300):
                begin = time.perf_counter()
                work()
                turns.append(time.perf_counter() - begin)
            return 1e6 * min(turns) / count

        with stepper(Empty()) as (graph, trained):
            trained(4)
            index, augmentation = graph._index.clone(), graph._epoch
            heartbeat, signals = Heartbeat(), SignalHandler(Comm(), ())
            plan = EpochPlan.of(parse_args(["--train-batch", str(BATCH)]).train, 1, COUNT, 1)
            loop = TrainLoop(graph.step, graph.images, plan)
            loop.graph = graph

            def after_step(done):
                heartbeat.beat(f"step {done + 1} of epoch 1")
                signals.poll()

            def epoch():
                loop.train_epoch(TrainState(), after_step, pytest.fail, [(0, BATCH)] * 100)

            times = {
                "an empty replay": best(graph._replay),
                "a replayed step": best(lambda: graph(index, augmentation, 1)),
                "the same inside the loop": best(epoch, 100),
                "torch.manual_seed": best(lambda: torch.manual_seed(1)),
            }
            heartbeat.idle()
        print("".join(f"\n{name}: {time:.2f} us" for name, time in times.items()))
        assert times["the same inside the loop"] < times["torch.manual_seed"]


FAMILIES = {
    "alexnet": {}, "vgg11_bn": {}, "resnet": {"depth": 8}, "preresnet": {"depth": 8},
    "resnext": {"depth": 11, "cardinality": 2, "widen_factor": 1},
    "wrn": {"depth": 10, "widen_factor": 1, "drop": 0.3}, "densenet": {"depth": 16, "drop": 0.1},
    "densenet in less memory": {"depth": 16, "checkpoint_activations": True},
}  # fmt: skip


class Synchronising(torch.nn.Module):
    """Reads a number back, which makes the host wait for the device and may not be captured."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)) * float(x.mean())


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", [*FAMILIES, None])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_step_holds_nothing_that_the_host_waits_for(monkeypatch, device, name, amp):
    """Tensors without numbers: whoever asks for one fails. On a GPU that is not there autograd
    cannot go backward; gradients and the update are looked at on the CPU."""
    device = torch.device(device, 0) if device == "cuda" else torch.device(device)
    real = synthetic_images()
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with FakeTensorMode() as mode, device:
        make = (
            Synchronising
            if name is None
            else lambda: create_model(name.split()[0], **FAMILIES[name])
        )
        model = make().train()
        images = object.__new__(ImageSet)
        images.__dict__ |= vars(real) | {"device": device, "storage_device": device}
        for part in ("windows", "labels", "scale", "shift"):
            tensor = mode.from_tensor(vars(real)[part])
            setattr(
                images, part, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            )
        optimizer = build_optimizer(model, 0.1, 0.9, 5e-4, False)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        comm = Comm()
        comm.device = device
        meter = Meter(device)
        step = Step(comm, *comm.prepare(model, optimizer, SYNC), amp)
        index = torch.zeros(BATCH, dtype=torch.int64)
        augmentation = torch.zeros(COUNT, 3, dtype=torch.int64)

        def train():
            for _ in range(2):  # momentum is made in the first
                batch, labels = images.batch(index, augmentation)
                loss, output = step(batch, labels, BATCH, seed=None)
                meter.update(loss, output, labels)

        if name is None:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                train()
        else:
            train()
            assert meter.sums.device == device


def test_masks_that_are_drawn_again_keep_their_generator(monkeypatch):
    """Elsewhere checkpointing touches no generator, as a graph would not permit."""
    calls = []
    real = torch.get_rng_state
    monkeypatch.setattr(torch.random, "get_rng_state", lambda: calls.append(1) or real())
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(1) or real())
    for drop in (0.0, 0.1):
        calls.clear()
        model = create_model("densenet", depth=16, checkpoint_activations=True, drop=drop)
        model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
        assert bool(calls) == bool(drop)


def test_momentum_is_restored_where_it_is(tmp_path):
    """Also what a file does not have, which becomes zero."""
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, 0.1, 0.9, 0, False)
    model(torch.ones(1, 3)).sum().backward()
    fresh = with_plain_rate(optimizer.state_dict())
    optimizer.step()
    saved = copy.deepcopy(with_plain_rate(optimizer.state_dict()))
    kept = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    wanted = [tensor.clone() for tensor in kept]
    assert wanted[0].any()
    for state, loaded in ((saved, True), (fresh, True), (None, False), (saved, True)):
        optimizer.step()
        assert load_optimizer(optimizer, {"optimizer": state}, tmp_path) is loaded
        now = [entry["momentum_buffer"] for entry in optimizer.state.values()]
        assert all(one is other for one, other in zip(now, kept, strict=True))
        for one, other in zip(now, wanted, strict=True):
            assert torch.equal(one, other if state is saved else torch.zeros_like(other))
