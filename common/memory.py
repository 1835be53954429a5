"""Memory and work of a run: measured, limited, and estimated from the model's config.

Sizes are in bytes unless a name says GiB (2^30 bytes).
"""

import math
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from common import models
from common.distributed import gather_numbers, local_world_size
from common.errors import UserError

GIB = 2**30
CUDA_LIBRARIES = 0.065 * GIB  # allocated by cuBLAS and others through PyTorch


def host_peak_gib() -> float:
    """Returns the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def host_gib() -> float:
    """Returns the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def gpu_peak_gib() -> float | None:
    """Returns the peak memory allocated by PyTorch on this rank's GPU, or None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def allocated_gib(device: torch.device) -> float:
    """Returns the memory allocated on this rank's GPU; on a CPU, the resident memory of this process."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else host_gib()


# ----------------------------------------------------------------------------------------------------- before the start


def limit_gpu(gib: float | None) -> None:
    """Limits how much of its GPU this process may use, to try out a smaller one; None sets no limit."""
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise UserError(f"--gpu_memory {gib:g}: there is no GPU to limit")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if gib * GIB > total:
        raise UserError(f"--gpu_memory {gib:g} GiB is more than the {total / GIB:.1f} GiB that the GPU has")
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)


def usable_gpu_bytes(device: torch.device) -> float:
    """Returns how many bytes PyTorch may allocate on this rank's GPU; infinity without a GPU.

    That is the limit set by `limit_gpu`, but at most the total minus 1 GiB, which is left for the CUDA context, NCCL
    and fragmentation.
    """
    if device.type != "cuda":
        return math.inf
    total = torch.cuda.get_device_properties(device).total_memory
    return min(total * torch.cuda.get_per_process_memory_fraction(device), total - GIB)


def set_gpu_allocator() -> None:
    """Lets GPU memory segments grow, which reduces fragmentation. Call it before the first allocation."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def host_total() -> float:
    """Returns the bytes of memory of this machine, or the limit of this process's control group if that is less."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), cgroup_limit())


def cgroup_limit(membership: str | Path = "/proc/self/cgroup", root: str | Path = "/sys/fs/cgroup") -> float:
    """Returns the smallest memory limit in bytes of this process's control group and its ancestors; infinity if none.

    Slurm sets the limit of `--mem` on the job's group, a container sets it on the group that it sees as the root.

    Args:
        membership: lists the process's groups: `0::/system.slice/.../job_7/step_0` under cgroup v2, one line per
            controller such as `4:memory:/slurm/uid_0/job_7/step_0` under v1.
        root: where the control groups are mounted.
    """
    try:
        groups = Path(membership).read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    limit = math.inf
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, file = Path(root), "memory.max"
        elif "memory" in controllers.split(","):
            base, file = Path(root, "memory"), "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(base):
                with suppress(OSError, ValueError):  # no such file, or no limit ("max")
                    limit = min(limit, int((directory / file).read_text()))
    return limit


def check_host(needed: float, once: float = 0, gib: float | None = None, hint: str = "") -> None:
    """Raises UserError if the ranks of this host need more memory than it has.

    Args:
        needed: bytes per rank.
        once: bytes that only rank 0 needs on top.
        gib: --host_memory; None is what the machine reports, which is too little if it adds memory on demand.
        hint: appended to the message.
    """
    total = host_total() if gib is None else gib * GIB
    ranks = local_world_size()
    if needed * ranks + once > total:
        raise UserError(
            f"this run needs about {(needed * ranks + once) / GIB:.1f} GiB of host memory ({ranks} ranks x "
            f"{needed / GIB:.1f} GiB), this host has {total / GIB:.1f} GiB{hint}"
        )


def resident(parameters: int, dp_world_size: int, dtype: torch.dtype, stage: int, device: torch.device) -> float:
    """Returns the bytes of host memory that a rank of zero/ needs: model and states only if there is no GPU."""
    if device.type == "cuda":
        return 3 * GIB
    return sum(model_states(parameters, dp_world_size, dtype)[stage]) + GIB


def offloaded(parameters: int, dp_world_size: int, stage: int, device: torch.device) -> float:
    """Returns the bytes of host memory that a rank of offload/ needs.

    Per parameter of its shard 18 bytes: master weight, Adam's two moments and the gradient in float32, and the 16-bit
    weight before it is copied to the GPU. Under stage 3 the 16-bit weights stay in host memory, and building the model
    takes more: 22 bytes, measured. Without a GPU, what it would hold comes on top. Libraries take 1 GiB, with CUDA 3.
    """
    share = (22 if stage == 3 else 18) * parameters / dp_world_size
    if device.type == "cuda":
        return share + 3 * GIB
    return share + 8 * parameters / (dp_world_size if stage == 3 else 1) + GIB


def activations(config: PreTrainedConfig, tokens: int) -> int:
    """Estimates the bytes that the forward pass of a micro-batch keeps for the backward pass, in 16 bit.

    Per token and block these are the inputs of the matrix products and of what lies between them: 7 tensors as wide as
    the hidden state, and 4 as wide as the inner layer of a gated MLP (2 of a plain one). Attention keeps no scores.
    This is for all architectures of offload/; `layer_activations` is closer, but only for the Llama family.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = 4 if hasattr(config, "hidden_act") else 2
    return 2 * tokens * config.num_hidden_layers * (7 * config.hidden_size + wide * inner)


def layer_activations(config: PreTrainedConfig, rows: int, length: int) -> int:
    """Returns the bytes that one Llama-family decoder layer keeps for the backward pass, in 16 bit.

    This is with PyTorch's kernels; liger-kernel and torch.compile keep a third less. Per token 4 tensors as wide as the
    MLP, 8 as wide as the hidden state (float32 ones in norms count twice), queries, keys, values and output with all
    heads, and a row of the attention mask.
    """
    heads = 4 * _attention_width(config)
    return 2 * rows * length * (4 * config.intermediate_size + 8 * config.hidden_size + heads + length)


def _attention_width(config: PreTrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim * config.num_attention_heads


def logits(config: PreTrainedConfig, tokens: int) -> int:
    """Returns the bytes of a micro-batch's logits and their gradient, in 16 bit."""
    return 2 * 2 * tokens * config.vocab_size


# ------------------------------------------------------------------------------------------------- layers of a pipeline


def layer_sizes(config: PreTrainedConfig) -> list[int]:
    """Returns the number of parameters of each pipeline layer: embedding, decoder layers, final norm, head.

    A tied head counts too, because on a different stage than the embedding it is a separate copy.
    """
    model = models.meta_model(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder = [sum(p.numel() for p in block.parameters()) for block in models.blocks(model)]
    norm = sum(p.numel() for p in model.parameters()) - sum(decoder) - sum(w.numel() for w in {embedding, head})
    return [embedding.numel(), *decoder, norm, head.numel()]


def layer_costs(config: PreTrainedConfig, mean_context_len: float, checkpointing: bool = False) -> list[float]:
    """Returns the work of each pipeline layer, forward and backward, in floating-point operations per token.

    A matrix product costs 2 operations per weight forward and 4 backward. Attention costs 12 x head dim x heads
    for each earlier token that a token attends to (PaLM, appendix B). Embedding and final norm count as 0.

    Args:
        mean_context_len: mean number of tokens that a token attends to (`common.rows.Rows.mean_context_len`).
        checkpointing: whether decoder layers run forward twice.
    """
    decoder = layer_sizes(config)[1]
    attention = 12 * _attention_width(config) * mean_context_len
    passes = 4 / 3 if checkpointing else 1
    head = 6 * config.vocab_size * config.hidden_size
    return [0, *[passes * (6 * decoder + attention)] * config.num_hidden_layers, 0, head]


def balance(
    costs: list[float], num_stages: int, fits: Callable[[int, int, int], bool] = lambda stage, start, end: True
) -> list[int] | None:
    """Splits a sequence of layers so that the slowest stage is as fast as possible.

    Each stage gets at least one layer that costs anything. (DeepSpeed's `partition_balanced` may leave a stage empty.)
    Of equally good splits it takes the one with fewer layers on the early stages, which keep more activations.

    Args:
        costs: of the layers.
        fits: returns whether a stage can hold the layers start .. end - 1.

    Returns:
        num_stages + 1 indices of layers: stage s gets the layers bounds[s] .. bounds[s + 1] - 1. None if no split fits.
    """
    ends = [index + 1 for index, cost in enumerate(costs) if cost]
    ends[-1] = len(costs)
    # best[e] = (cost of the slowest stage, bounds) for the layers up to ends[e] on the stages so far.
    best = {e: (sum(costs[:end]), [0, end]) for e, end in enumerate(ends) if fits(0, 0, end)}
    for stage in range(1, num_stages):
        splits = {
            e: [
                (max(slowest, sum(costs[bounds[-1] : end])), [*bounds, end])
                for b, (slowest, bounds) in best.items()
                if b < e and fits(stage, bounds[-1], end)
            ]
            for e, end in enumerate(ends)
        }
        best = {e: min(found) for e, found in splits.items() if found}
    return best[len(ends) - 1][1] if len(ends) - 1 in best else None


def stage_peak(
    config: PreTrainedConfig,
    sizes: list[int],
    num_stages: int,
    stage: int,
    start: int,
    end: int,
    checkpointing: bool,
    *,
    dtype: torch.dtype,
    dp_world_size: int,
    micro_batches: int,
    rows: int,
    length: int,
) -> float:
    """Estimates the peak GPU memory of a pipeline stage under ZeRO-1, in bytes, to a few percent.

    Weights and gradients in `dtype` stay allocated, and so do master weights and Adam's moments, 12 bytes per parameter
    sharded among the replicas. Two further needs occur at different times, so only the larger one counts:

    - forward and backward passes: the activations of the S - s micro-batches in flight on stage s of S (1F1B), on the
      last stage the logits and their gradient, and the gradient of embedding or head before it is accumulated;
    - the optimizer: the gradients of one parameter group, about a layer, flattened and then in float32.

    Args:
        sizes: `layer_sizes`.
        start, end: the stage holds the layers start .. end - 1.
        checkpointing: whether decoder layers keep only their input.
        dtype: of weights and gradients.
        rows, length: of a micro-batch.
    """
    held, head = sizes[start:end], len(sizes) - 1
    tokens, bytes_ = rows * length, dtype.itemsize
    hidden = bytes_ * tokens * config.hidden_size
    activations = layer_activations(config, rows, length) * bytes_ // 2
    micro_batch = (min(end, head - 1) - max(start, 1)) * (hidden if checkpointing else activations)
    passes = min(num_stages - stage, micro_batches) * micro_batch + activations * checkpointing
    if end > head:
        passes += bytes_ * (2 * tokens * config.vocab_size + sizes[head])
    elif start == 0:  # by then the micro-batch's activations are freed
        passes = max(passes, passes - micro_batch + bytes_ * sizes[0])
    update = (bytes_ + 4) * max(held) / dp_world_size
    permanent = sum(held) * (2 * bytes_ + 12 / dp_world_size)
    return permanent + max(passes, update) + 7 * hidden + CUDA_LIBRARIES


# --------------------------------------------------------------------------------------------- as the ZeRO paper counts


def model_states(parameters: int, dp_world_size: int, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """Returns the bytes that a rank holds between two steps for each ZeRO stage (arXiv:1910.02054, sections 3.1 and 5).

    Weights and gradients are in the run's dtype; Adam's two moments and the master weights are in float32, 12 bytes per
    parameter. (A float32 run needs no master weights, but DeepSpeed keeps a copy from stage 1 on.) Stage 1 shards the
    optimizer states among the ranks, stage 2 also the gradients, stage 3 also the weights.

    Returns:
        For each of the stages 0 to 3: (weights, gradients, optimizer states).
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


def zero_table(
    parameters: int,
    dp_world_size: int,
    dtype: torch.dtype,
    stage: int,
    device: torch.device,
    offload: bool = False,
    coalesced: bool = False,
) -> list[str]:
    """Returns the lines of a memory table with a row per stage, this run's marked, and what was measured. Collective.

    Args:
        offload: the optimizer states are in host memory, as are a float32 copy of the gradients and the 16-bit weights
            before they are copied to the GPU: 18 bytes per parameter (ZeRO-Offload, arXiv:2101.06840).
        coalesced: every rank accumulates all gradients, whatever the stage.
    """
    own_peak = (gpu_peak_gib() or 0.0) if device.type == "cuda" else host_peak_gib()
    allocated, peak = map(max, zip(*gather_numbers([allocated_gib(device), own_peak], device), strict=True))
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
    lines.append(
        f"measured under stage {stage} {where}: {allocated:.2f} GiB between two steps, {peak:.2f} GiB at the peak"
    )
    return lines
