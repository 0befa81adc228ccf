"""The processes that train one site together, and the little they must agree on.

Gradients are DistributedDataParallel's matter; what is here keeps the processes in step around
it. A process that left a step alone would leave the others waiting for its gradients.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from flap_nvflare.settings import SettingsError
from flap_nvflare.training.inferer import choose_device


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default the only one.

    Attributes:
        rank: this process, from 0.
        count: number of processes.
        device: where tensors must lie that the processes exchange.
        group: their process group of torch.distributed; None for one process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes files and speaks for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. All must call this."""
        return self.total(float(flag)) > 0

    def total(self, value: float) -> float:
        """The sum of `value` over the processes, the same in all. All must call this."""
        if self.count == 1:
            return value
        # A sum and no maximum: what is not finite in one process is not finite in the sum.
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total, group=self.group)
        return float(total)

    def leave(self) -> None:
        """Ends the process group, if there is one."""
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)


ONE_PROCESS = Ranks()


def join_ranks(device: torch.device) -> Ranks:
    """Joins the processes that torchrun started: over NCCL on GPUs, else over Gloo.

    Args:
        device: of this process, from `rank_device`.

    Raises:
        SettingsError: if torchrun did not start this process.
    """
    _variable("RANK")
    distributed = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(
        distributed.get_rank(), distributed.get_world_size(), device, distributed.group.WORLD
    )


def rank_device(wish: str) -> torch.device:
    """The device of this process: the GPU of its number on this machine, or the CPU.

    Args:
        wish: the site's `device`; of several GPUs CUDA_VISIBLE_DEVICES chooses.

    Raises:
        SettingsError: if torchrun did not start this process, the wish names one GPU, or there
            are fewer GPUs than processes.
    """
    local_rank = _variable("LOCAL_RANK")
    device = choose_device(wish)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise SettingsError(
            f"device: {wish!r} is one GPU, but each process needs its own; give cuda or auto, and "
            f"choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise SettingsError(
            f"process {local_rank} finds no GPU of its own: {found} are visible; start at most "
            f"{found} processes (setting processes, or --nproc_per_node), or see to "
            f"CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _variable(name: str) -> int:
    if name not in os.environ:
        raise SettingsError(
            f"{name} is not set: start multi_gpu_train.yaml by torchrun --nproc_per_node=N, or "
            f"leave it out to train in one process"
        )
    return int(os.environ[name])
