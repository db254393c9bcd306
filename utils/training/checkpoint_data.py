"""What a checkpoint knows of its images, against what the flags and the data set say.

A network scores wrongly, and without any error, on images that are normalised otherwise than those
it was trained on, or whose classes have other numbers. So the file's word counts, and a flag that
says otherwise is refused.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from utils import log
from utils.checkpoint.resume import LoadedCheckpoint
from utils.config.args import DATASETS
from utils.config.schema import Config, DataConfig
from utils.config.validation import check
from utils.data.datasets import LEGACY_STATISTICS, Dataset
from utils.errors import UserError, one_line

_NAMES_SHOWN = 3


def resolve_data(config: Config, loaded: LoadedCheckpoint | None) -> Config:
    """Return the configuration with data set and statistics of a checkpoint, where no flag says.

    Raises:
        UserError: A flag does not go with the checkpoint's data set, or -d names another.
    """
    if loaded is None:
        return config
    content, data = loaded.content, config.data
    name = content.get("dataset")
    if name in DATASETS and name != data.dataset:
        if "dataset" not in config.explicit:
            log.note(f"{loaded.path}: was trained on {name}: taken as if -d {name} was given")
            data = replace(data, dataset=name)
        elif "folder" not in (name, data.dataset):  # A folder may hold the same classes.
            raise UserError(
                f"-d {data.dataset}: {loaded.path} was trained on {name}, which has other classes; "
                "leave -d out, or name another file"
            )
    if "stats" not in config.explicit:
        data = replace(data, stats=_recorded_stats(content))
    config = config.replace(data=data)
    check(config)
    return config


def _recorded_stats(content: Mapping[str, Any]) -> str:
    """Return by which flag a checkpoint's images were normalised.

    Files of older scripts do not say. All scripts of this family have the legacy statistics.
    """
    if not says_statistics(content):
        return "legacy"
    options = content.get("options")
    stats = options.get("stats") if isinstance(options, dict) else None
    return str(stats) if stats in ("true", "legacy") else "true"


def says_statistics(content: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint says how its images were normalised."""
    return content.keys() >= {"mean", "std"}


def match_dataset(
    dataset: Dataset, loaded: LoadedCheckpoint | None, config: Config
) -> tuple[Dataset, LoadedCheckpoint | None]:
    """Let a data set and a checkpoint agree.

    The data set gets the checkpoint's statistics and numbers of classes. The checkpoint loses its
    accuracies where they were measured on other images than this run validates on: they could not
    be compared.

    Args:
        dataset: The data set of the flags.
        loaded: The checkpoint, if any.
        config: The configuration; it knows which flags were given.

    Raises:
        UserError: --stats says otherwise than the checkpoint, or the classes are others.
    """
    if loaded is None:
        return dataset, None
    dataset = _with_classes(_with_statistics(dataset, loaded, config), loaded, config)
    content, scores = loaded.content, {"acc", "best_acc", "best_epoch"}
    if config.run.evaluate or _is_validated_alike(content, dataset, config.data):
        return dataset, loaded
    log.note(
        f"{loaded.path}: its accuracies were measured on other images than this run validates on, "
        "or on the same in another order: the best epoch counts from here on"
    )
    rest = {key: value for key, value in content.items() if key not in scores}
    return dataset, replace(loaded, content=rest)


def _is_validated_alike(content: Mapping[str, Any], dataset: Dataset, data: DataConfig) -> bool:
    """Return whether a checkpoint was validated on the images of this run, as far as it says."""
    images, options = content.get("images"), content.get("options")
    if images is None or options is None:
        return True
    split = options.get("val_split")
    # The held-out images are some of the training images.
    part = slice(0, 2) if split else slice(2, 4)
    return split == data.val_split and images[part] == dataset.checksums[part]


def _with_statistics(dataset: Dataset, loaded: LoadedCheckpoint, config: Config) -> Dataset:
    content, own = loaded.content, (dataset.mean, dataset.std)
    if not says_statistics(content):
        source = "by --stats" if "stats" in config.explicit else "assumed"
        if source == "assumed" and own == LEGACY_STATISTICS:
            log.note(
                f"{loaded.path}: does not say how its images were normalised; taken for the "
                f"{describe_statistics(*own)} of older scripts (--stats true or legacy decides)"
            )
        return replace(dataset, statistics_from=source)
    mean, std = tuple(content["mean"]), tuple(content["std"])
    if "stats" in config.explicit and not np.allclose((mean, std), own, rtol=0, atol=1e-6):
        raise UserError(
            f"--stats {config.data.stats}: is {describe_statistics(*own)}, and {loaded.path} was "
            f"trained with {describe_statistics(mean, std)}; leave --stats out"
        )
    return replace(dataset, mean=mean, std=std, statistics_from="of the file")


def _with_classes(dataset: Dataset, loaded: LoadedCheckpoint, config: Config) -> Dataset:
    known = loaded.content.get("classes")
    if known is None:
        return replace(dataset, classes_from="of the data set: the file names none")
    wanted = [unicodedata.normalize("NFC", name) for name in known]
    found = [unicodedata.normalize("NFC", name) for name in dataset.classes]
    dataset = replace(dataset, classes=tuple(known), classes_from="of the file")
    if wanted == found:
        return dataset
    if sorted(wanted) != sorted(found) or len(set(wanted)) < len(wanted):
        where = f"-d {config.data.dataset}"
        if config.data.dataset == "folder":
            where += f" --data {config.data.data}"
        raise UserError(
            f"{where}: has other classes than {loaded.path} was trained on: "
            f"{_difference(found, wanted)}; name the data of that training, or another file"
        )
    log.note(f"{loaded.path}: has the classes in another order; they are numbered as in the file")
    numbers = np.array([wanted.index(name) for name in found], np.int64)
    return replace(
        dataset,
        train_labels=numbers[dataset.train_labels],
        test_labels=numbers[dataset.test_labels],
    )


def _difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    """Return in words which classes only one of the two has."""
    parts = [
        f"only {where} {'has' if where == 'the file' else 'have'} {_shown(names)}"
        for where, names in (
            ("these images", [name for name in found if name not in wanted]),
            ("the file", [name for name in wanted if name not in found]),
        )
        if names
    ]
    return ", ".join(parts) or "some have the same name"


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return " ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def log_read_as(loaded: LoadedCheckpoint) -> None:
    """Print what a file of another script was taken for, if anything in it needed that."""
    if loaded.content["read_as"]:
        log.note(one_line(f"{loaded.path}: read {', '.join(loaded.content['read_as'])}"))


def describe_statistics(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return statistics in words: ``mean 0.4914 0.4822 0.4465, std 0.2470 0.2435 0.2616``."""
    words = (" ".join(f"{value:.4f}" for value in values) for values in (mean, std))
    return "mean {}, std {}".format(*words)


def describe_scoring(dataset: Dataset, images: int, split: str) -> str:
    """Return in words what an accuracy is of: images, their classes, and their statistics.

    Args:
        dataset: The data set.
        images: How many images have been scored.
        split: Which part of it they are: "test" or "validation".
    """
    name = f"{dataset.name} {dataset.folder}".rstrip()
    return (
        f"{split} set of {name}, {images:,} images; {len(dataset.classes)} classes "
        f"({dataset.classes_from}); {describe_statistics(dataset.mean, dataset.std)} "
        f"({dataset.statistics_from})"
    )
