"""What a training step cost: time, speed, the arithmetic of the models, memory."""

import dataclasses
import os
import resource
import sys

import psutil
import torch

from minitron.hardware import peak_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Meter:
    """Turns a step's seconds into figures. `tokens`: of one step over all ranks; `flops_per_token`: of every model's passes over a token.

    FLOPs are those of the models' matrices, attention scores and heads, multiply-adds counted as two, a backward pass as two forward passes
    (arXiv 2204.02311, appendix B); what is computed twice to save memory is counted once, attention at full length.
    """

    tokens: int
    ranks: int
    flops_per_token: float | None = None
    peak_tflops: float | None = None

    def figures(self, step_seconds: float, data_seconds: float, memory_gib: float) -> dict[str, float]:
        """What a step is logged with: speeds over all ranks and per rank (on GPUs, of one GPU), and rank 0's seconds and memory.

        Without `flops_per_token` there is no `tflop_per_second_per_rank`, without `peak_tflops` no `mfu`, the share of the peak that was used.
        """
        per_second = self.tokens / step_seconds
        found = {
            "tokens_per_second": per_second,
            "tokens_per_second_per_rank": per_second / self.ranks,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "peak_memory_gib": memory_gib,
        }
        if self.flops_per_token is not None:
            found["tflop_per_second_per_rank"] = self.flops_per_token * per_second / self.ranks / 1e12
            if self.peak_tflops is not None:
                found["mfu"] = found["tflop_per_second_per_rank"] / self.peak_tflops
        return found


def device_peak(device: torch.device, dtype: str) -> float | None:
    """`peak_of` this process's device; None for a CPU."""
    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def gpu_name(device: torch.device) -> str:
    """What its maker calls it."""
    return torch.cuda.get_device_name(device)


def give_back(device: torch.device) -> None:
    """Let other processes have the memory of a GPU that this one took and has no use for now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> float:
    """The most memory that this process had so far, in GiB: what torch allocated on its GPU, or on a CPU what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on its device; on a host they are shared out between the processes that torchrun started there."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return int(psutil.virtual_memory().available) // processes
