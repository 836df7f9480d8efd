"""Whether an error means that memory ran out."""

from typing import Literal

SAID = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)
"""In the messages of torch's RuntimeErrors that mean it: not all of them are OutOfMemoryErrors."""


def cause_of(error: BaseException) -> Literal["", "out of memory"]:
    """Why a process failed, where another plan can help, as Progress has it."""
    import torch

    said = isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    return "out of memory" if said or isinstance(error, torch.OutOfMemoryError | MemoryError) else ""
