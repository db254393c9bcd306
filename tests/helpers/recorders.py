"""Stand-ins for CUDA graphs on the CPU, and the program that trains with them.

    python tests/helpers/recorders.py KIND FAULTS SCRIPT ARGUMENTS...

trains as tools/fault_injection.py does, but records each step with a Replayer or a Tape. When its
engine closes, and at its end, every rank prints how often it has replayed, what is left of the
recordings, what has been asked of the recorder, and when the engine has prepared the model.
"""

import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cifar import run
from tools import fault_injection
from tools.commands import engine_class
from utils.distributed.comm import Comm
from utils.runtime.exit_codes import exit_process, run_worker
from utils.training import cuda_graph


def state_of(work: Callable[[], None]) -> dict[str, Tensor]:
    """By name, the tensors that a recorded step, a method of its StepGraph, finds in place."""
    found = work.__self__
    step, images = found.step, found.images
    named = {
        "sums": found.meter.sums, "index": found._index, "augmentation": found._augmentation,
        "windows": images.windows, "labels": images.labels, "scale": images.scale,
        "shift": images.shift, **step.model.state_dict(keep_vars=True),
    }  # fmt: skip
    for number, group in enumerate(step.optimizer.param_groups):
        named[f"rate {number}"] = group["lr"]
    for number, entry in enumerate(step.optimizer.state.values()):
        named |= {f"{name} {number}": t for name, t in entry.items() if isinstance(t, Tensor)}
    return named


@contextmanager
def without_effect(work: Callable[[], None]) -> Iterator[None]:
    """What a recorded step has changed is afterwards as before: to record is not to do."""
    before = [(tensor, tensor.detach().clone()) for tensor in state_of(work).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


class Replayer:
    """What it "records" is done again by Python, which works with several workers, too.

    Every replay looks whether all that the step works on is still where it was recorded.

    Attributes:
        calls: what has been asked of it.
        recordings: weak references to all that it has returned.
    """

    seconds = 1.5

    def __init__(self, device: torch.device | None = None) -> None:
        self.calls: list[str] = []
        self.recordings: list[weakref.ref] = []

    @contextmanager
    def on_stream(self):
        self.calls.append("enter")
        yield
        self.calls.append("leave")

    def record(self, work):
        self.calls.append("record")
        replay = self._replay_of(work)
        places = {name: tensor.data_ptr() for name, tensor in state_of(work).items()}

        def checked():
            self.calls.append("replay")
            now = {name: tensor.data_ptr() for name, tensor in state_of(work).items()}
            moved = [name for name in places if now.get(name) != places[name]]
            assert not moved, f"no longer at their place: {moved}"
            replay()

        self.recordings.append(weakref.ref(checked))
        return checked

    def _replay_of(self, work):
        return work

    def drop(self):
        self.calls.append("drop")

    def report(self, when):
        alive = sum(recording() is not None for recording in self.recordings)
        count = self.calls.count("replay")
        calls = " ".join(call for call in self.calls if call != "replay")
        said = f"{when}: {count} replays, {alive} recordings alive; {calls}\n"
        os.write(sys.stdout.fileno(), said.encode())  # at once, as another rank writes, too


class Tape(Replayer):
    """Records operations with the very tensors that they read and wrote.

    A replay does them again, on these tensors, and no Python: like a graph, and unlike Python, it
    does not see a tensor that has been put into another's place.
    """

    def _replay_of(self, work):
        with without_effect(work), _Operations() as tape:
            work()
        return tape.again


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def again(self):
        for operation, args, kwargs, written in self.done:
            for old, new in zip(written, tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Unable(Replayer):
    """On rank 1 the recording fails inside the backward pass, as an operation of it may do."""

    def _hooked(self, model, hook):
        return next(model.parameters()).register_hook(hook)  # whose gradient is the last

    def record(self, work):
        if os.environ["RANK"] != "1":
            return super().record(work)

        def refuse(*_: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        handle = self._hooked(work.__self__.step.model, refuse)
        try:
            with without_effect(work):
                work()
        finally:
            handle.remove()
        raise AssertionError("has been recorded")


class UnableForward(Unable):
    """The same inside the forward pass."""

    def _hooked(self, model, hook):
        return next(m for m in model.modules() if not list(m.children())).register_forward_hook(
            hook
        )


KINDS = {"replayer": Replayer, "tape": Tape, "unable": Unable, "unable-forward": UnableForward}


def main() -> int:
    kind, faults, script, *arguments = fault_injection.arguments()
    recorder = KINDS[kind]()
    cuda_graph.RECORDERS["cpu"] = lambda device: recorder
    cls = engine_class(script)
    join = cls.join

    def join_with_graphs(timeout: float) -> Comm:
        comm = join(timeout)
        comm.graph_warm_up_steps = 3
        close, prepare = comm.close, comm.prepare

        def note_and_prepare(*arguments: Any) -> Any:
            recorder.calls.append("prepare")
            return prepare(*arguments)

        def look_and_close() -> None:
            recorder.report("closing")
            close()

        comm.close, comm.prepare = look_and_close, note_and_prepare
        return comm

    cls.join = join_with_graphs
    fault_injection.inject_all(faults)
    code = run_worker(cls, run, arguments)
    recorder.report("ending")
    return code


if __name__ == "__main__":
    exit_process(main())
