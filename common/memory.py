"""What a run holds, in GiB (2^30 bytes): measured, and as the ZeRO paper counts it."""

import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError
from common.launch import local_world_size, world_size

GIB = 2**30


def host_peak_gib():
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def host_gib():
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def gpu_peak_gib():
    """Peak memory that PyTorch's allocator held on this rank's GPU, or None without one."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def gather_peaks(device, *numbers):
    """For each rank [its host peak, its GPU peak (0 without), *numbers]; a collective call."""
    mine = torch.tensor([host_peak_gib(), gpu_peak_gib() or 0.0, *numbers], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def peaks(ranks):
    """From `gather_peaks`: the sum of the ranks on the first host, and the largest of all GPUs or None."""
    here = local_world_size()
    return {
        "host_peak_gib": sum(numbers[0] for numbers in ranks[:here]),
        "gpu_peak_gib": max(numbers[1] for numbers in ranks) or None,
    }


# ------------------------------------------------------------------------------------- as the ZeRO paper counts


def model_states(parameters, dp_world_size, dtype):
    """Bytes that a rank holds between two steps, for each ZeRO stage (ZeRO, arXiv:1910.02054, section 3.1 and 5).

    Weights and gradients in the run's type; Adam's two moments and the master weights in float32, 12 bytes a
    parameter. (A float32 run needs no master weights: DeepSpeed keeps its copy from stage 1 on.) Stage 1 divides
    the optimizer's states by the number of ranks, stage 2 the gradients too, stage 3 the weights as well.

    Returns:
        A list over stages 0 to 3 of (weights, gradients, optimizer states).
    """
    weights = gradients = parameters * dtype.itemsize
    share = 1 / dp_world_size
    unsharded = parameters * (12 if dtype != torch.float32 else 8)
    states = parameters * 12 * share
    return [
        (weights, gradients, unsharded),
        (weights, gradients, states),
        (weights, gradients * share, states),
        (weights * share, gradients * share, states),
    ]


def zero_table(parameters, dp_world_size, dtype, stage, device):
    """The lines of the technique's memory table, this run's stage marked, with what was measured. A collective call."""
    ranks = gather_peaks(device, held_gib(device))
    held = max(numbers[2] for numbers in ranks)
    peak = max(numbers[1] if device.type == "cuda" else numbers[0] for numbers in ranks)
    size = str(dtype).removeprefix("torch.")
    lines = [
        f"memory per rank in GiB, as the ZeRO paper counts it: {parameters:,} parameters in {size}, "
        f"{dp_world_size} rank{'s' * (dp_world_size > 1)}",
        "  stage   weights  gradients  optimizer states    total",
    ]
    for number, parts in enumerate(model_states(parameters, dp_world_size, dtype)):
        weights, gradients, states = (part / GIB for part in parts)
        lines.append(
            f"{'*' if number == stage else ' '} {number:5} {weights:9.3f} {gradients:10.3f} {states:17.3f} "
            f"{weights + gradients + states:8.3f}"
        )
    where = "on the GPU" if device.type == "cuda" else "in the process, libraries included"
    lines.append(f"measured under stage {stage} {where}: {held:.3f} between two steps, {peak:.3f} at the peak")
    return lines


def held_gib(device):
    """What is allocated on this rank's device now."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else host_gib()
