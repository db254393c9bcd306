"""The configuration of a run: a frozen dataclass for each group of flags, and all of them together.

The parser in utils/config/args.py has the defaults and the meaning of each flag; a field has the
name of its flag's option. A run never changes its configuration. A decision that turns out
otherwise, such as a precision that the processor cannot compute in, makes a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

# Flags that go to the model's factory, as spelled on the command line. Unset, they leave the
# model's own default in force.
MODEL_FLAGS = {
    "depth": "--depth",
    "cardinality": "--cardinality",
    "widen_factor": "--widen-factor",
    "growth_rate": "--growthRate",
    "compression_rate": "--compressionRate",
    "drop": "--drop",
    "block_name": "--block-name",
    "checkpoint_activations": "--checkpoint-activations",
}

# Options that change no number of a training, rounding aside: where files are, what is reported,
# and how the same numbers are computed. Which images there are is told by Dataset.checksums.
WITHOUT_EFFECT = frozenset({
    "data", "data_url", "data_archive", "data_md5", "workers", "checkpoint", "resume",
    "save_every", "overwrite", "trace", "tensorboard", "check_replicas", "gpu_id", "local_rank",
    "trust_checkpoint", "timeout", "graph", "resident", "memory_format", "test_batch",
    "checkpoint_activations",
})  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained; None leaves the model's own default."""

    arch: str
    depth: int | None
    block_name: str | None
    cardinality: int | None
    widen_factor: int | None
    growth_rate: int | None
    compression_rate: int | None
    drop: float | None
    checkpoint_activations: bool | None

    def arguments(self) -> dict[str, Any]:
        """Return the flags that are set, by the names of the arguments of the model's factory."""
        values = {name: getattr(self, name) for name in MODEL_FLAGS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DataConfig:
    """Which images the network is trained and evaluated on."""

    dataset: str
    data: str
    data_url: tuple[str, ...]
    data_archive: str | None
    data_md5: str | None
    workers: int  # Threads that decode images, as the flag -j of this family of scripts means it.
    stats: str
    pad_mode: str
    val_split: int | None
    train_size: int | None
    test_size: int | None


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    epochs: int
    start_epoch: int | None
    train_batch: int
    batch_per_worker: int | None
    test_batch: int
    lr: float
    lr_scaling: str
    schedule: tuple[int, ...]
    gamma: float
    warmup_steps: int
    warmup: str
    momentum: float
    nesterov: bool
    weight_decay: float
    sync_bn: bool
    on_nan: str
    seed: int


@dataclass(frozen=True)
class GradientSyncConfig:
    """How the workers average their gradients, and notice one that fails."""

    compression: str
    backward_passes_per_step: int
    adasum: bool
    check_replicas: int | None
    timeout: float
    no_exchange: bool


@dataclass(frozen=True)
class RunConfig:
    """What the run does besides training, and where its files are."""

    checkpoint: str | None
    resume: str | None
    save_every: int | None
    overwrite: bool
    evaluate: bool
    per_class: bool
    estimate: bool
    trust_checkpoint: bool
    trace: str | None
    tensorboard: bool


@dataclass(frozen=True)
class HardwareConfig:
    """What the run computes on, and in which precision."""

    gpu_id: str | None
    amp: str
    tf32: str | None
    compile: bool
    graph: str
    resident: str
    memory_format: str
    dtype: str
    deterministic: bool
    local_rank: int | None  # Old launchers pass it; LOCAL_RANK in the environment is what counts.


@dataclass(frozen=True)
class Config:
    """The whole configuration, group by group.

    Only what makes it, checks it and hands it on sees all of it: the parser, ``run_worker``,
    ``run`` and utils/training/build.py. Everything else takes the group or the values it uses.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    gradient_sync: GradientSyncConfig
    run: RunConfig
    hardware: HardwareConfig
    # The options that the command line names; what a checkpoint knows goes before the others.
    explicit: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Config":
        """Return the configuration of a flat dictionary of options.

        Raises:
            KeyError: An option is missing.
        """
        groups = (group for group in fields(cls) if is_dataclass(group.type))
        return cls(**{group.name: _group(group.type, options) for group in groups})

    def options(self) -> dict[str, Any]:
        """Return the flat dictionary of options that checkpoints and args.json hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for group in vars(self).values()
            if is_dataclass(group)
            for name, value in vars(group).items()
        }

    def replace(self, **groups: Any) -> "Config":
        """Return a copy with other groups."""
        return replace(self, **groups)

    def fingerprint(self) -> dict[str, object]:
        """Return by its flag every option that all workers must have in common."""
        return {
            f"--{name.replace('_', '-')}": value
            for name, value in self.options().items()
            if name != "local_rank"  # It says which worker this is.
        }


def _group(kind: Any, options: Mapping[str, Any]) -> Any:
    values = {field.name: options[field.name] for field in fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
