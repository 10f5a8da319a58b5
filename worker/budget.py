"""Budget: how many bytes of models a worker may keep, on its device and in the host's memory below it."""

import os
from pathlib import Path
from typing import Final

import torch

DEVICE_SHARE: Final = 0.7  # of an accelerator's memory: the rest is for what a forward computes with
HOST_SHARE: Final = 0.5  # of the host's: other processes live there
CGROUP: Final = Path("/sys/fs/cgroup/memory.max")


def device_budget(setting: int | None, device: torch.device) -> int:
    """Bytes for models on `device`: as set, else a share of what it has."""
    if setting is not None:
        return setting
    if device.type == "cuda":
        return int(DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(HOST_SHARE * host_memory())


def host_budget(setting: int | None, device: torch.device) -> int:
    """Bytes for models that had to leave `device`; none where the device's memory is the host's own."""
    if device.type != "cuda":
        return 0
    return int(HOST_SHARE * host_memory()) if setting is None else setting


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container it seems to be."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return whole
