"""The device that a run computes on: the GPUs that it sees, seeds and deterministic algorithms."""

import os

import torch

from utils.config.schema import HardwareConfig
from utils.errors import UserError


def select_gpus(ids: str | None) -> None:
    """Let CUDA see the GPUs of --gpu-id only; call this before CUDA is initialised.

    Raises:
        UserError: The ids are malformed, or the machine has no such GPU.
    """
    if ids is None:
        return
    wanted = ids.split(",")
    if not all(number.isdecimal() for number in wanted) or len(set(wanted)) < len(wanted):
        raise UserError(f"--gpu-id {ids!r}: give ids such as 0 or 0,1, each once")
    os.environ["CUDA_VISIBLE_DEVICES"] = ids
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < len(wanted):
        raise UserError(
            f"--gpu-id {ids}: the machine has not all of these GPUs; "
            "name ids it has, or leave the flag out (without any GPU the CPU trains)"
        )


def configure(hardware: HardwareConfig, seed: int) -> None:
    """Seed what draws initial weights, and set which algorithms may compute.

    Args:
        hardware: Says whether algorithms may vary from run to run, and whether GPUs may round fp32
            products to TF32; where it does not say, PyTorch's own choice stays.
        seed: The seed of the run.
    """
    torch.manual_seed(seed)
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not hardware.deterministic
    if hardware.tf32:
        allowed = hardware.tf32 == "on"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a step draws from: the generators of the host and of the device.

    torch.manual_seed goes through the back ends of devices that are not there, too, which costs
    more of the host's time than all else that a replayed step needs.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
