"""Faults: what an error means for the run it came from, and for the device."""

import torch

from app.core.errors import OutOfMemory

# After these every call to the device fails, whoever makes it (CUDA's documentation calls them sticky).
STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "uncorrectable ECC",
    "launch timed out",
    "uncorrectable NVLink",
    "GPU is lost",
    "context is destroyed",
)


class DeviceLost(BaseException):
    """The device answers no more in this process: end it, and let others make its jobs.

    No Exception, lest what handles the failure of one job take it for that. Nothing was thrown into the runs.
    """


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    # The CPU's allocator raises a plain RuntimeError, and CUDA's own calls an AcceleratorError.
    text = str(error)
    return "DefaultCPUAllocator" in text or (isinstance(error, torch.AcceleratorError) and "out of memory" in text)


def is_device_lost(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in STICKY)
