"""How offload/ fits a step into GPU and host memory: recomputation, fused loss, gradient accumulation, allocators."""

import argparse
import os
import resource
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from common import memory
from common.cli import positive_float, positive_int
from common.distributed import world_size
from common.memory import GIB
from common.models import ModelInfo
from common.rows import RowLoader
from common.tracking import RunLog


class Plan(NamedTuple):
    """What saves GPU memory in a step.

    Attributes:
        activation_checkpointing: recompute each block in the backward pass.
        fused_loss: compute head and loss for a slice of tokens at a time (fused_loss.py).
        accumulate_on_gpu: add up the gradients of all micro-batches before they go to the host.
    """

    activation_checkpointing: bool
    fused_loss: bool
    accumulate_on_gpu: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of offload/."""
    group = parser.add_argument_group("offload")
    group.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute each block in the backward pass instead of keeping its activations; default: if they would not "
        "fit",
    )  # fmt: skip
    group.add_argument(
        "--fused_loss", action=argparse.BooleanOptionalAction,
        help="compute head and loss for a slice of tokens at a time; default: if the logits would take more than a "
        "tenth of the GPU",
    )  # fmt: skip
    group.add_argument(
        "--coalesce", action=argparse.BooleanOptionalAction,
        help="add up the gradients of all micro-batches on the GPU, so that they go to the host once per step; "
        "default: if they take less than a quarter of the GPU",
    )  # fmt: skip
    group.add_argument(
        "--gpu_memory", type=positive_float, metavar="GIB",
        help="use only this much of the GPU, to try out a smaller one",
    )  # fmt: skip
    group.add_argument(
        "--host_memory", type=positive_float, metavar="GIB", help="memory of this host; default: what it reports"
    )
    group.add_argument(
        "--cpu_threads", type=positive_int, metavar="N",
        help="threads of each rank's optimizer; default: the host's cores divided by its ranks",
    )  # fmt: skip


def make_plan(
    args: argparse.Namespace, info: ModelInfo, train: RowLoader, stage: int, device: torch.device, log: RunLog
) -> Plan:
    """Chooses what the flags leave open by what would otherwise not fit the GPU, and logs the choices and reasons.

    Args:
        args: activation_checkpointing, fused_loss and coalesce (None leaves the choice open), and gpu_memory.
        train: the micro-batches.
        stage: of ZeRO.
    """
    tokens, micro_batches = train.micro_batch_size * train.rows.max_length, train.gradient_accumulation_steps
    activations, logits = memory.activations(info.config, tokens), memory.logits(info.config, tokens)
    weights = 2 * info.parameters if stage < 3 else 0
    gradients = 2 * info.parameters  # all of them, because ZeRO shards them only on their way to the host
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        gpu = total if args.gpu_memory is None else args.gpu_memory * GIB
        known = f"this GPU has {gpu / GIB:.1f}"
    else:
        gpu, known = float("inf"), "no GPU here"

    accumulate = (micro_batches > 1 and gradients < gpu / 4) if args.coalesce is None else args.coalesce
    fuse = logits > gpu / 10 if args.fused_loss is None else args.fused_loss
    needed = weights + gradients * accumulate + activations + logits * (not fuse)
    recompute = needed > 0.9 * gpu if args.activation_checkpointing is None else args.activation_checkpointing

    def describe(what: str, on: bool, flag: bool | None, size: int) -> str:
        why = "as the flag says" if flag is not None else f"{size / GIB:.2f} GiB per micro-batch, {known}"
        return f"{what}: {'on' if on else 'off'} ({why})"

    trips = "once" if accumulate or micro_batches == 1 else f"{micro_batches} times"
    where = f" (added up on the device over {micro_batches} micro-batches)" if accumulate else ""
    log.info(
        describe("activation checkpointing", recompute, args.activation_checkpointing, activations),
        describe("fused loss", fuse, args.fused_loss, logits),
        f"gradients to the host: {trips} per step{where}",
    )
    return Plan(recompute, fuse, accumulate)


def check_host(args: argparse.Namespace, parameters: int, dtype: torch.dtype, stage: int, device: torch.device) -> None:
    """Raises UserError if the ranks of this host need more memory than it has (see `memory.offloaded`)."""
    per_rank = memory.offloaded(parameters, world_size(), stage, device)
    weights_file = dtype.itemsize * parameters * args.save_checkpoint  # gathered on rank 0
    memory.check_host(per_rank, weights_file, args.host_memory, hint=" (--host_memory if it has more than it reports)")


def set_allocators() -> str:
    """Chooses how GPU memory and pinned host memory are allocated. Call it before the first allocation of either.

    Memory is pinned with `mlock` if the system allows it, because PyTorch rounds pinned allocations up to powers of
    two, which is 8 GiB more for a model of 1.2 B parameters.

    Returns:
        A line that says how memory is pinned.
    """
    memory.set_gpu_allocator()
    if not torch.cuda.is_available():
        return "pinned memory: none, there is no GPU"
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return "pinned memory: by PyTorch, rounded up to powers of two (mlock is limited, see ulimit -l)"
    os.environ.setdefault("DS_PIN_MEMORY_BACKEND", "native")
    return f"pinned memory: DS_PIN_MEMORY_BACKEND={os.environ['DS_PIN_MEMORY_BACKEND']}"


def describe_engine(engine: DeepSpeedEngine) -> list[str]:
    """Returns lines that say what the engine runs, according to its own settings."""
    stage, weights = engine.zero_optimization_stage(), engine.zero_offload_param()
    return [
        "=" * 60,
        f"DeepSpeed ZeRO-{stage} Initialization Complete",
        "=" * 60,
        f"  ZeRO Stage: {stage}",
        f"  Parameter offloading: {weights is not None and weights.device != 'none'}",
        f"  Optimizer offloading: {engine.zero_cpu_offload()}",
        f"  Global rank: {engine.global_rank}",
        f"  World size: {engine.world_size}",
        f"  Device: {engine.device}",
        "=" * 60,
    ]
