"""What a run holds, in GiB (2^30 bytes): measured, and as the ZeRO paper counts it."""

import math
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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
    if world_size() == 1:
        return [mine.tolist()]
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


# ------------------------------------------------------------------------------------------- before the start


def limit_gpu(gib):
    """Lets this process use so much of its GPU and no more, to try out a smaller card; None is all of it."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"--gpu_memory {gib:g}: there is no GPU whose memory could be limited")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if gib * GIB > total:
        raise UserError(f"--gpu_memory {gib:g} GiB is more than the {total / GIB:.1f} GiB that the GPU has")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)


def usable_gpu_bytes(device) -> float:
    """Bytes that PyTorch may allocate on the smallest GPU of all ranks, or infinity without GPUs. A collective call.

    That is the allocator's cap, if set, and never more than the total minus 1 GiB, which is left for the CUDA context,
    NCCL and fragmentation.
    """
    if device.type != "cuda":
        return math.inf
    total = torch.cuda.get_device_properties(device).total_memory
    usable = min(total * torch.cuda.get_per_process_memory_fraction(device), total - GIB)
    smallest = torch.tensor(usable, dtype=torch.float64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest.item()


def set_allocators():
    """Chooses how GPU memory and pinned host memory are allocated, before the first of either; returns a line on it.

    On the host `mlock` where the system allows it: PyTorch's pinned allocations are rounded up to powers of two, for a
    model of 1.2 B parameters 8 GiB more.
    """
    set_gpu_allocator()
    if not torch.cuda.is_available():
        return "pinned memory: none, there is no GPU"
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return "pinned memory: by PyTorch, rounded up to powers of two (mlock is limited here, see ulimit -l)"
    os.environ.setdefault("DS_PIN_MEMORY_BACKEND", "native")
    return f"pinned memory: DS_PIN_MEMORY_BACKEND={os.environ['DS_PIN_MEMORY_BACKEND']}"


def set_gpu_allocator():
    """Lets memory segments on the GPU grow: fixed ones fragment a nearly full GPU. Call before the first allocation."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def host_total():
    """Bytes of memory that this machine has, or that the control group of this process allows if that is less."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), cgroup_limit())


def cgroup_limit(membership="/proc/self/cgroup", root="/sys/fs/cgroup") -> float:
    """The smallest memory limit, in bytes, of this process's control group and its ancestors; infinity without one.

    Slurm sets `--mem` on the job's group, a container its limit on the group that it sees as the root.

    Args:
        membership: lists the process's groups: `0::/system.slice/.../job_7/step_0` under cgroup v2, one line per
            controller such as `4:memory:/slurm/uid_0/job_7/step_0` under v1.
        root: where the control groups are mounted.
    """
    limit = math.inf
    lines = []
    with suppress(OSError):  # not Linux
        lines = Path(membership).read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, file = Path(root), "memory.max"
        elif "memory" in controllers.split(","):
            base, file = Path(root, "memory"), "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such file, or no limit ("max")
                limit = min(limit, int((directory / file).read_text()))
            if directory == base:
                break
    return limit


def check_host(needed, once=0, gib=None, hint=""):
    """Raises UserError if the ranks of this host need more memory than it has.

    Args:
        needed: bytes a rank.
        once: bytes that rank 0 alone needs besides.
        hint: what to do if that is not so.
        gib: --host_memory; None is what the machine says, which is too little where memory is added on demand.
    """
    total = host_total() if gib is None else gib * GIB
    ranks = local_world_size()
    if needed * ranks + once > total:
        raise UserError(
            f"this run needs about {(needed * ranks + once) / GIB:.1f} GiB of host memory ({ranks} ranks x "
            f"{needed / GIB:.1f} GiB), this host has {total / GIB:.1f} GiB{hint}"
        )


class Plan(NamedTuple):
    """How offload/ makes a step fit the GPU; see `plan`."""

    activation_checkpointing: bool
    fused_loss: bool
    coalesce: bool


def plan(args, config, device, parameters, stage, tokens, micro_batches):
    """Decides what the flags leave open, from what would fit this GPU without it.

    Args:
        args: activation_checkpointing, fused_loss, coalesce (None: decide) and gpu_memory.
        parameters: of the model.
        tokens: of a micro-batch.
        micro_batches: of a step.

    Returns:
        (Plan, lines that say what was decided and why).
    """
    weights = 2 * parameters if stage < 3 else 0
    kept, head = activations(config, tokens), logits(config, tokens)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        gpu = total if args.gpu_memory is None else args.gpu_memory * GIB
        known = f"this GPU has {gpu / GIB:.1f}"
    else:
        gpu, known = float("inf"), "no GPU here"
    gradients = 2 * parameters  # all of them, since ZeRO cuts them up only on their way to the host
    coalesce = micro_batches > 1 and gradients < gpu / 4
    coalesce = coalesce if args.coalesce is None else args.coalesce
    fused = head > gpu / 10 if args.fused_loss is None else args.fused_loss
    needed = weights + gradients * coalesce + kept + head * (not fused)
    recompute = needed > 0.9 * gpu if args.activation_checkpointing is None else args.activation_checkpointing

    def line(what, on, flag, bytes_):
        why = "as the flag says" if flag is not None else f"{bytes_ / GIB:.2f} GiB a micro-batch, {known}"
        return f"{what}: {'on' if on else 'off'} ({why})"

    trips = "once" if coalesce or micro_batches == 1 else f"{micro_batches} times"
    trips = f"gradients to the host: {trips} a step"
    return Plan(recompute, fused, coalesce), [
        line("activation checkpointing", recompute, args.activation_checkpointing, kept),
        line("fused loss", fused, args.fused_loss, head),
        trips + (f" (added up on the device over {micro_batches} micro-batches)" if coalesce else ""),
    ]


def resident(parameters, dp_world_size, dtype, stage, device):
    """Bytes of host memory that a rank of zero/ needs: next to nothing with a GPU, else the model and its states."""
    if device.type == "cuda":
        return 3 * GIB
    return sum(model_states(parameters, dp_world_size, dtype)[stage]) + GIB


def offloaded(parameters, dp_world_size, stage, device):
    """Bytes of host memory that a rank of offload/ needs.

    For each parameter of its share: master weight, Adam's two moments and gradient in float32, and the 16-bit weight
    on its way up, 18 bytes; under stage 3 the weight also has its home there, and building takes more: 22 measured.
    Without a GPU what that would hold comes on top. The libraries take 1 GiB, with CUDA 3.
    """
    share = (22 if stage == 3 else 18) * parameters / dp_world_size
    if device.type == "cuda":
        return share + 3 * GIB
    return share + 8 * parameters / (dp_world_size if stage == 3 else 1) + GIB


def activations(config, tokens):
    """Bytes that the backward pass of a micro-batch keeps from its forward pass, about, in 16 bit.

    Of each block the inputs of its matrix products and of what is between them: 7 tensors as wide as the hidden
    state and 4 as wide as the inner layer of a gated MLP (2 of a plain one); attention keeps no scores.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = 4 if hasattr(config, "hidden_act") else 2
    return 2 * tokens * config.num_hidden_layers * (7 * config.hidden_size + wide * inner)


def layer_activations(config, rows, length):
    """Bytes that the backward pass of one Llama-family decoder layer keeps from its forward pass, in 16 bit.

    That is with PyTorch's kernels; liger-kernel and torch.compile keep a third less. Per token 4 tensors as wide as the
    MLP, 8 as wide as the hidden state (float32 ones in norms count twice), queries, keys, values and output with all
    heads, and a row of the attention mask.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 4 * head_dim * config.num_attention_heads
    return 2 * rows * length * (4 * config.intermediate_size + 8 * config.hidden_size + heads + length)


def logits(config, tokens):
    """Bytes of a micro-batch's logits and their gradient, in 16 bit."""
    return 2 * 2 * tokens * config.vocab_size


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


def zero_table(parameters, dp_world_size, dtype, stage, device, offload=False, coalesced=False):
    """The lines of the technique's memory table, this run's stage marked, with what was measured. A collective call.

    With `coalesced` gradients are added up whole on every rank, whatever the stage.
    With `offload` the optimizer's states are on the host, and with them a float32 copy of the gradients and the
    16-bit weights that go up (ZeRO-Offload, arXiv:2101.06840): 18 bytes a parameter there.
    """
    ranks = gather_peaks(device, held_gib(device))
    held = max(numbers[2] for numbers in ranks)
    peak = max(numbers[1] if device.type == "cuda" else numbers[0] for numbers in ranks)
    unit, scale = ("GiB", GIB) if parameters > 1e8 else ("MiB", 2**20)
    lines = [
        f"memory per rank in {unit}, as the ZeRO paper counts it: {parameters:,} parameters in "
        f"{str(dtype).removeprefix('torch.')}, {dp_world_size} rank{'s' * (dp_world_size > 1)}",
        f"  stage   weights  gradients  optimizer states     total{'   on the host' * offload}",
    ]
    for number, parts in enumerate(model_states(parameters, dp_world_size, dtype)):
        weights, gradients, states = (part / scale for part in parts)
        host = ""
        if coalesced:
            gradients = parameters * dtype.itemsize / scale
        if offload and number:
            states, host = 0.0, f"{18 * parameters / dp_world_size / scale:14.2f}"
        lines.append(
            f"{'*' if number == stage else ' '} {number:5} {weights:9.2f} {gradients:10.2f} {states:17.2f} "
            f"{weights + gradients + states:9.2f}{host}"
        )
    where = "on the GPU" if device.type == "cuda" else "in the process, libraries included"
    lines.append(f"measured under stage {stage} {where}: {held:.2f} GiB between two steps, {peak:.2f} GiB at the peak")
    return lines


def held_gib(device):
    """What is allocated on this rank's device now."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else host_gib()
