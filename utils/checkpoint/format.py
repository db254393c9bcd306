"""Checkpoint files: their names, what they hold, and how they are read, older scripts' included.

A file holds the keys that users of bearpaw-style scripts know (``epoch`` is the next epoch to
train, ``state_dict``, ``acc``, ``best_acc``, ``optimizer``) and more beside them. There are only
tensors, numbers, strings, lists and dicts in it, so that ``torch.load(weights_only=True)`` reads
it. A digest of all of it is among them, because ``torch.load`` does not notice a flipped bit.
"""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import SHORTCUT, identify
from utils import log
from utils.checkpoint.digest import digest
from utils.checkpoint.fields import check_fields
from utils.checkpoint.foreign import find_weights, in_our_words, plain_names
from utils.checkpoint.weights import is_safetensors, unpack
from utils.errors import UserError, reason_of, require_packages

FORMAT = 2
LATEST = "checkpoint.pth.tar"
PREVIOUS = "checkpoint.previous.pth.tar"
DAMAGED = "checkpoint.damaged.pth.tar"
BEST = "model_best.pth.tar"

# What torch says where reading would run code; a trusted file is then read all the same.
_NEEDS_TRUST = re.compile("GLOBAL|unsupported class|Can only (create|build|append|extend|set)")
# What people have in place of a checkpoint: how it begins, and what it is.
_NO_CHECKPOINTS = (
    (b"version https://git-lfs", "a git-lfs pointer and not the file; get that by 'git lfs pull'"),
    (b"<!doctype html", "a web page and not the file; download that anew"),
    (b"<html", "a web page and not the file; download that anew"),
)


def load(path: Path, flag: str = "--resume", trust: bool | None = False) -> dict[str, Any]:
    """Read a checkpoint, of this suite or of another script.

    Nothing in the file is executed unless ``trust`` says that it may be. A bare state dict counts
    as a checkpoint without history, and so does a safetensors file.

    Args:
        path: The file.
        flag: The flag that has named the file, for messages only.
        trust: Whether reading may execute code in the file; None where a user cannot allow it.

    Returns:
        The file's dict; ``state_dict`` in it has the raw model's names (no ``module.``), and what
        a run relies on is of the right type. ``read_as`` says what a file of another script was
        taken for.

    Raises:
        UserError: There is no such file, or it is damaged, needs code to be read, or has a later
            format.
    """
    return parse(read(path, flag), path, flag, trust)


def read(path: Path, flag: str = "--resume") -> bytes:
    """Return the bytes of a checkpoint file.

    Raises:
        UserError: It cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it, such as {path / LATEST}")
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from error


def parse(content: bytes, path: Path, flag: str, trust: bool | None) -> dict[str, Any]:
    """Return what the bytes of a checkpoint file hold; see ``load``.

    Args:
        content: The bytes.
        path: The file that they come from, for messages only.
        flag: The flag that has named the file, for messages only.
        trust: Whether reading may execute code in the file; None where a user cannot allow it.

    Raises:
        UserError: As ``load``, but for a missing file.
    """
    if content[257:262] == b"ustar":  # torch.load would unpack it into a folder.
        raise UserError(f"{flag} {path}: a file of torch before 0.2; save it again by a newer one")
    state = _decoded(content, path, flag, trust)
    found = find_weights(state)
    if found is None or not all(
        isinstance(name, str) and is_plain(value) for name, value in found[0].items()
    ):
        raise UserError(f"{flag} {path}: holds no weights; name a training checkpoint")
    weights, key = found
    if not key:
        state = {}
    written = state.get("format", 0)
    if type(written) is not int or written < 1:
        written = 0  # Another script means something else by it.
    if written > FORMAT:
        raise UserError(
            f"{flag} {path}: written in format {written}, this version reads up to "
            f"{FORMAT}; use a newer version"
        )
    if written and (written >= 2 or "digest" in state) and not _has_its_digest(state):
        raise UserError(f"{flag} {path}: damaged (its digest does not fit); name another file")
    ours = written or is_safetensors(content)
    said = {**state, "read_as": []} if ours else in_our_words(state, key)
    try:
        said = check_fields(said)
    except ValueError as error:
        raise UserError(f"{flag} {path}: {error}; name another file") from error
    return {**said, "state_dict": plain_names(weights)}


def _decoded(content: bytes, path: Path, flag: str, trust: bool | None) -> Any:
    """Return what the bytes hold."""
    for beginning, what in _NO_CHECKPOINTS:
        if content[:100].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(beginning):
            raise UserError(f"{flag} {path}: {what}")
    weights_alone = is_safetensors(content)
    if weights_alone:
        require_packages(f"{flag} {path}", "safetensors")
    try:
        if weights_alone:
            return unpack(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=not trust)
    except Exception as error:
        why = reason_of(error).splitlines()[0]
        if "weights_only" in str(error) or "Weights only" in str(error):
            why = "damaged, or no file of torch.save"
            if _NEEDS_TRUST.search(str(error)):
                why = "damaged, or reading it would run code in it"
                if trust is not None:
                    why += ": --trust-checkpoint allows that for a file that you know"
        raise UserError(
            f"{flag} {path}: not a readable checkpoint ({why}); name another file"
        ) from error


def load_newest(folder: Path, trust: bool) -> tuple[Path, bytes, dict[str, Any]] | None:
    """Return path, bytes and content of a run folder's newest good checkpoint, or None.

    Raises:
        UserError: There are checkpoints, and all are damaged.
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
            log.warning(f"{failures[0]}: going back to the save before, {path.name}")
        return path, content, state
    if failures:
        raise UserError(
            f"{' and '.join(failures)}: no checkpoint of this run is good; --overwrite starts anew"
        )
    return None


def _has_its_digest(state: dict[str, Any]) -> bool:
    """Take the digest out of a state and return whether it is that of the rest."""
    try:
        return state.pop("digest", None) == digest(state)
    except Exception:  # No save writes a list within itself, or a tensor without content.
        return False


def is_plain(value: Any) -> bool:
    """Return whether a value is no tensor, or one that holds real numbers, all of them."""
    return not isinstance(value, Tensor) or (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_complex()
        and not value.is_quantized
    )


def describe_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    """Return in words which network has tensors of these names and shapes."""
    if found := identify(shapes):
        return describe_model(*found)
    if found := identify(shapes, but_for=SHORTCUT):
        return (
            f"{describe_model(*found)} with shortcuts without parameters (option A), which no "
            "network of this suite has"
        )
    return "another network"


def describe_model(arch: str, arguments: dict[str, Any]) -> str:
    """Return a network in words: ``resnet (depth 20, num_classes 10)``."""
    return f"{arch} ({', '.join(f'{name} {value}' for name, value in arguments.items())})"
