"""The weights that a published run keeps: rounded to float16, and scored before and after."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils import log
from utils.checkpoint.format import BEST, LATEST, describe_model, load, parse
from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.weights import in_half_precision, pack
from utils.config.schema import Config
from utils.data.datasets import Dataset
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.metrics.meter import Metrics
from utils.training import build

# Weights are kept where their file is not larger than this.
MAX_BYTES = 8_000_000
# Percentage points of accuracy that rounding may change.
MAX_ROUNDING_CHANGE = 0.02
# Percentage points by which a score may differ from the log's, which may be in another precision.
MAX_DIFFERENCE_FROM_LOG = 1.0

# The files of a run folder that weights are taken from. The second of each is what a run folder
# that has travelled without its checkpoints holds: weights that are rounded already.
_SOURCES = {"best": (BEST, "best.safetensors"), "last": (LATEST, "last.safetensors")}


class Scorer:
    """Scores weights on the test set of a run, in the precision that the network is built in.

    Args:
        config: The configuration of the run.
        dataset: Its data set.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        """Load the sets."""
        self._config = config.replace(
            run=replace(config.run, evaluate=True), hardware=replace(config.hardware, amp="off")
        )
        self._dataset = dataset
        self._comm = Comm()
        self._splits = build.splits(dataset, self._config, self._comm)

    def __call__(self, path: Path, content: dict[str, Any]) -> Metrics:
        """Return the metrics of the weights of a checkpoint.

        Args:
            path: The file, for messages.
            content: What it holds.

        Raises:
            UserError: The file holds another network.
        """
        loaded = LoadedCheckpoint(path, content, "RUN_FOLDER")
        model, _ = build.model(self._config, self._dataset, self._splits, loaded, self._comm)
        return build.evaluator(model, self._config, self._comm)(self._splits.test)


def choose_weights(
    run: Path, config: Config, dataset: Dataset, logged: Mapping[str, tuple[float, int]]
) -> tuple[dict[str, Any], bytes] | None:
    """Return what result.json says of the weights that a published run keeps, and their file.

    These are the weights of the best epoch. Where rounding changes their score they are those of
    the last epoch, and where it changes that too there are none.

    Args:
        run: The run folder.
        config: The configuration of the run.
        dataset: Its data set.
        logged: For "best" and "last" the accuracy in per cent and the epoch, as the log has them.

    Raises:
        UserError: A checkpoint is damaged, of another network or another epoch, or the weights
            score so differently on these images that the run had others.
    """
    scorer = Scorer(config, dataset)
    sources = {name: _source(run, name, epoch) for name, (_, epoch) in logged.items()}
    for name, (accuracy, epoch) in logged.items():
        if (source := sources[name]) is None:
            continue
        path, content = source
        about = {
            "classes": list(dataset.classes),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "trained_epochs": epoch,
        }
        arguments = config.model.arguments()
        arguments.pop("checkpoint_activations", None)  # It is no property of a network.
        network = describe_model(config.model.arch, arguments)
        packed = pack(
            in_half_precision(content["state_dict"]),
            {**about, "network": network, "dataset": dataset.name},
        )
        if len(packed) > MAX_BYTES:
            log.note(f"{path}: its weights have {len(packed):,} bytes, too many to be kept")
            return None
        before = None if path.suffix == ".safetensors" else scorer(path, content).top1
        after = scorer(path, parse(packed, path, "RUN_FOLDER", trust=False))
        _check_score(path, after.top1 if before is None else before, accuracy)
        if abs(after.top1 - (accuracy if before is None else before)) > MAX_ROUNDING_CHANGE + 1e-9:
            log.note(f"{path}: scores {after.top1:.2f} % in half precision, otherwise than before: "
                     "not kept")  # fmt: skip
            continue
        return {
            **about,
            "file": f"{name}.safetensors",
            "arch": config.model.arch,
            "arguments": arguments,
            "bytes": len(packed),
            "sha256": hashlib.sha256(packed).hexdigest(),
            "accuracy": round(after.top1, 4),
            "accuracy_before": None if before is None else round(before, 4),
            "correct": round(after.top1 * after.images / 100),
            "images": after.images,
        }, packed
    return None


def _source(run: Path, name: str, epoch: int) -> tuple[Path, dict[str, Any]] | None:
    """Return a run folder's file with the "best" or the "last" weights, and its content, if any.

    Raises:
        UserError: It is damaged, or a checkpoint of another epoch.
    """
    for path in (run / source for source in _SOURCES[name]):
        if not path.exists():
            continue
        content = load(path, flag="RUN_FOLDER", trust=None)
        if path.suffix != ".safetensors" and content.get("epoch") != epoch:
            raise UserError(
                f"{path}: holds the weights after epoch {content.get('epoch')}, the {name} ones of "
                f"the log are of epoch {epoch}; continue the run with --resume auto if its last "
                "save has failed, or remove the file to publish without it"
            )
        return path, content
    log.note(f"{run}: has no {_SOURCES[name][0]}, whose weights could be scored and kept")
    return None


def _check_score(path: Path, accuracy: float, logged: float) -> None:
    """Raise a UserError if a score is not that of the log, as on other images."""
    if abs(accuracy - logged) > MAX_DIFFERENCE_FROM_LOG:
        raise UserError(
            f"{path}: scores {accuracy:.2f} % on these images, its log says {logged:.2f} %; name "
            "the images of the run with --data, --data-archive"
        )
