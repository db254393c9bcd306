"""Checkpoints: what a run saves, how it is written, and what is read from older scripts.

A file holds the keys that users of bearpaw-style scripts know (``epoch`` is the next epoch to
train, ``state_dict``, ``acc``, ``best_acc``, ``optimizer``) and more beside them; only tensors,
numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)`` reads it. A digest of
all of it is among them: ``torch.load`` itself does not notice a flipped bit.
"""

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import identify
from utils.checkpoint.train_state import Position
from utils.distributed.comm import Comm, set_float_buffers
from utils.errors import NotFinite, UserError
from utils.files import replace_by_link, write_atomically
from utils.runtime.provenance import versions

FORMAT = 2
LATEST = "checkpoint.pth.tar"
PREVIOUS = "checkpoint.previous.pth.tar"
DAMAGED = "checkpoint.damaged.pth.tar"
BEST = "model_best.pth.tar"


class Saver:
    """Saves the state of a run.

    Args:
        folder: the run folder.
        comm: the engine.
        model: the raw model.
        optimizer: as ``comm.wrap`` returned it.
        about: what does not change during a run: architecture, data set, options.
        say: prints a line.

    Attributes:
        path: of the newest checkpoint.
        failed: on rank 0, whether the last save has failed.
    """

    def __init__(
        self,
        folder: Path,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        about: dict[str, Any],
        say: Callable[[str], Any],
    ) -> None:
        self.folder = folder
        self.path = folder / LATEST
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.about = {"format": FORMAT, **about, "workers": comm.size, "versions": versions()}
        self.say = say
        self.failed = False

    def save(self, position: Position, is_best: bool) -> None:
        """Save at a position; every rank must call it, rank 0 writes.

        Nothing in the training changes by it. A disk that is full or gone costs this save, not
        the run: it is reported, and the next save tries again.

        Raises:
            NotFinite: on all ranks, instead of saving parameters that are not.
        """
        if self.comm.max_(int(self.comm.is_main and not _is_finite(self.model))):
            raise NotFinite(None)
        with self.comm.averaged_buffers(self.model) as rows:  # one sum over the workers
            if self.comm.is_main:
                self._write(position, rows, is_best)
        self.comm.may_regroup()

    def _write(self, position: Position, rows: Tensor, is_best: bool) -> None:
        state = {
            **self.about,
            "epoch": position.epoch,
            "step": position.step,
            "step_sums": position.sums,
            "acc": position.acc,
            "best_acc": position.best_acc,
            "best_epoch": position.best_epoch,
            "state_dict": {k: v.contiguous() for k, v in self.model.state_dict().items()},
            "buffers": rows,
            "optimizer": _with_plain_rate(self.optimizer.state_dict()),
        }
        try:
            save(self.folder, state, is_best)
            self.failed = False
        except (OSError, RuntimeError) as error:  # the latter is torch's word for a full disk
            self.failed = True
            self.say(
                f"warning: {self.path} cannot be written ({_why(error, self.folder)}); "
                "the files of the last save stay, training goes on to the next"
            )

    def read_back(self) -> dict[str, Any] | None:
        """The newest good checkpoint of the run, on every rank; None before the first save."""

        def read_newest() -> bytes:
            found = load_newest(self.folder, self.say, trust=False)
            return found[1] if found else b""

        content = self.comm.from_main(read_newest)
        return parse(content, self.path, "", trust=False) if content else None

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that ``read_back`` has returned."""
        load_model(self.model, state, self.path, "the network of this run")
        load_optimizer(self.optimizer, state, self.path)
        load_buffers(self.model, state, self.comm)


def _why(error: Exception, folder: Path) -> str:
    why = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    try:
        return f"{why}; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free"
    except OSError:
        return why


def _is_finite(model: nn.Module) -> bool:
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def _with_plain_rate(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state with the learning rate as a number, wherever it was in a tensor.

    A tensor's few digits are taken for those of the number: 0.1, not 0.10000000149011612.
    """

    def plain(rate: float | Tensor) -> float:
        return float(str(rate.cpu().numpy())) if isinstance(rate, Tensor) else rate

    groups = [{**group, "lr": plain(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def save(folder: Path, state: dict[str, Any], is_best: bool) -> None:
    """Write the newest checkpoint, and the best one too where is_best.

    The file before stays under its second name. At whatever moment the process is killed, one of
    the two is complete, and the best one is as new as the newest at least.
    """
    path = folder / LATEST

    def keep_others(new: Path) -> None:
        if is_best:
            replace_by_link(new, folder / BEST)
        if path.exists():
            replace_by_link(path, folder / PREVIOUS)

    complete = {**state, "digest": digest(state)}
    write_atomically(path, lambda file: torch.save(complete, file), keep_others)


def digest(value: Any) -> str:
    """SHA-256 of tensors, numbers and strings in dicts and lists, in hex."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor is larger than what is stored of it")
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            found.update(b"{")
            for key, item in value.items():
                feed(key)
                feed(item)
            found.update(b"}")
        elif isinstance(value, list | tuple):
            found.update(b"[")
            for item in value:
                feed(item)
            found.update(b"]")
        else:
            found.update(f"{value!r};".encode(errors="surrogatepass"))

    feed(value)
    return found.hexdigest()


def load(path: Path, flag: str = "--resume", trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint, of this suite or of an older script of the family.

    Nothing in the file is executed unless ``trust`` says that it may be. A bare state dict counts
    as a checkpoint without history.

    Returns:
        The file's dict; ``state_dict`` in it has the raw model's names (no ``module.``).

    Raises:
        UserError: no such file, damaged, needs code to be read, or of a later format.
    """
    return parse(read(path, flag), path, flag, trust)


def read(path: Path, flag: str = "--resume") -> bytes:
    """The bytes of a checkpoint file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error


def parse(content: bytes, path: Path, flag: str, trust: bool) -> dict[str, Any]:
    """What the bytes of a checkpoint file hold; see ``load``. The path is for messages only."""
    if content[257:262] == b"ustar":  # torch.load would unpack it into a temporary folder
        raise UserError(f"{flag} {path}: a file of torch before 0.2; save it again by a newer one")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=not trust)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            why = (
                "damaged, or reading it would run code in it: --trust-checkpoint allows that for "
                "a file that you know"
            )
        raise UserError(
            f"{flag} {path}: not a readable checkpoint ({why}); name another file"
        ) from error
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        state = {"state_dict": state}
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in weights.items()
    ):
        raise UserError(f"{flag} {path}: holds no 'state_dict'; name a training checkpoint")
    written = state.get("format", 0)
    if not isinstance(written, int) or written > FORMAT:
        raise UserError(
            f"{flag} {path}: written in format {written}, this version reads up to "
            f"{FORMAT}; use a newer version"
        )
    if (written >= 2 or "digest" in state) and not _has_its_digest(state):
        raise UserError(f"{flag} {path}: damaged (its digest does not fit); name another file")
    state["state_dict"] = {key.removeprefix("module."): value for key, value in weights.items()}
    return state


def _is_plain(value: Any) -> bool:
    """Whether a tensor holds real numbers, all of them; so does what is no tensor."""
    return not isinstance(value, Tensor) or (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def _has_its_digest(state: dict[str, Any]) -> bool:
    """Whether the digest in a state, which is taken out, is that of the rest."""
    try:
        return state.pop("digest", None) == digest(state)
    except Exception:  # no save has written a list within itself, or a tensor without content
        return False


def load_newest(
    folder: Path, say: Callable[[str], Any], trust: bool
) -> tuple[Path, bytes, dict[str, Any]] | None:
    """The newest checkpoint of a run folder that is good: path, bytes and content; None if none is.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    failures = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            content = read(path)
            state = parse(content, path, "--resume auto", trust)
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            say(f"warning: {failures[0]}: going back to the save before, {path.name}")
        return path, content, state
    if failures:
        raise UserError(
            f"{' and '.join(failures)}: no checkpoint of this run is good; --overwrite starts anew"
        )
    return None


def restore_newest(folder: Path) -> None:
    """Put the save before in the place of a newest one that is damaged or missing.

    The next save then cannot push the good one out. The damaged file stays under another name.
    """
    latest = folder / LATEST
    if latest.exists():
        latest.replace(folder / DAMAGED)
    replace_by_link(folder / PREVIOUS, latest)


def load_buffers(model: nn.Module, state: dict[str, Any], comm: Comm) -> None:
    """Give each worker its own batch-norm statistics again.

    Where the number of workers has changed all go on from the average, which the weights hold.
    """
    rows = state.get("buffers")
    if isinstance(rows, Tensor) and len(rows) == comm.size:
        set_float_buffers(model, rows[comm.rank])


def load_model(model: nn.Module, state: dict[str, Any], path: Path, wanted: str) -> None:
    """Load the weights after checking that they belong to this network.

    Args:
        model: the raw model.
        state: as ``load`` returned it.
        path: of the file, for the message.
        wanted: what the command line asks for, in words.

    Raises:
        UserError: the file holds another network; says which.
    """
    weights = state["state_dict"]
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Files written before torch 0.4.1 count no batches; the counter plays no part.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = {name: tuple(t.shape) for name, t in weights.items() if isinstance(t, Tensor)}
    if {k: v for k, v in shapes.items() if k not in counters} != {
        k: v for k, v in own.items() if k not in counters
    }:
        raise UserError(
            f"--resume {path}: holds {_describe(shapes)}, not {wanted}; "
            "give the matching -a, model flags and -d, or another file"
        )
    # Every name but the counters is known to be there, so strict would only reject old files.
    model.load_state_dict(weights, strict=False)


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    found = identify(shapes)
    if found is None:
        return "another network"
    arch, arguments = found
    return describe_model(arch, arguments)


def describe_model(arch: str, arguments: dict[str, Any]) -> str:
    """A network in words: ``resnet (depth 20, num_classes 10)``."""
    return f"{arch} ({', '.join(f'{name} {value}' for name, value in arguments.items())})"


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], path: Path) -> bool:
    """Restore the optimizer's momentum; its settings stay those of the command line.

    Momentum that is there already stays at its place in memory, where a CUDA graph goes on to use
    it; what the file does not have becomes zero.

    Returns:
        False where the file has no optimizer state.

    Raises:
        UserError: the state does not fit the parameters.
    """
    there = {
        (parameter, name): value
        for parameter, entry in optimizer.state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    saved = state.get("optimizer")
    if not saved:
        for value in there.values():
            value.zero_()
        return False
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        # Checked here because load_state_dict accepts buffers of any shape and fails in step().
        fits = all(
            _is_plain(value) and value.shape == parameters[int(index)].shape
            for index, entry in saved["state"].items()
            for value in entry.values()
            if isinstance(value, Tensor) and value.dim()
        )
        if fits:
            optimizer.load_state_dict(saved)
    except Exception as error:  # whatever another structure brings about
        raise UserError(f"--resume {path}: its optimizer state is damaged: {error}") from error
    if not fits:
        raise UserError(
            f"--resume {path}: its optimizer state belongs to another network; name another file"
        )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                place = there.pop((parameter, name), None)
                if place is None and value.dim():
                    # The fused update goes through momentum and parameter side by side in memory.
                    place = torch.empty_like(parameter)
                if place is not None:
                    entry[name] = place.copy_(value)
    for (parameter, name), place in there.items():
        optimizer.state[parameter][name] = place.zero_()
    return True
