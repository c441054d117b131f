"""Which devices a run trains on, and how a step uses their memory."""

from __future__ import annotations

import dataclasses

from train.command_line import check_least
from train.devices.mesh import axes_of


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """The devices, and how a step uses their memory."""

    mesh: str | None = None
    """devices by axis: data=8, or data=4,fsdp=2 to split parameters over two, too; without it, all on data"""
    distributed: bool = False
    """this is one of several processes, as SLURM, Open MPI, Kubernetes or a TPU pod starts them"""

    accumulate: int = 1
    """parts in which a step takes its batch, one after the other, to need less memory"""
    remat: bool = False
    """keep only the inputs of blocks for the backward pass, and compute all else again, to need less memory"""

    def __post_init__(self) -> None:
        check_least(self, accumulate=1)
        if self.mesh is not None:
            axes_of(self.mesh)
