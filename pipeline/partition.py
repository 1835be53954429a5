"""Which layers go to which stage, by the flags, the cost of each layer, and the memory of the GPUs."""

import argparse
import functools
import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig

from common import distributed, memory
from common.cli import positive_float, positive_int
from common.errors import UserError
from common.memory import balance, layer_costs
from common.models import ModelInfo
from common.rows import RowLoader
from common.tracking import RunLog

# Fraction of a GPU that a stage may fill; the rest is for fragmentation and for what `stage_peak` leaves out.
MAX_FILL = 0.98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of pipeline/."""
    group = parser.add_argument_group("pipeline")
    group.add_argument(
        "--num_stages", type=positive_int, metavar="N",
        help="pipeline stages; world size / N replicas train in parallel; default: one stage per rank",
    )  # fmt: skip
    group.add_argument(
        "--partition", metavar="HOW",
        help="balanced (equal work, head and loss included, as far as each stage fits its GPU), uniform (equal numbers "
        "of decoder layers), or decoder layers per stage such as 11,5; default: balanced, or as in the checkpoint when "
        "resuming",
    )  # fmt: skip
    group.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute each decoder layer in the backward pass instead of keeping its activations; default: on if "
        "the JSON enables it, or if a stage would not fit its GPU without it",
    )  # fmt: skip
    group.add_argument(
        "--gpu_memory", type=positive_float, metavar="GIB",
        help="use only this much of each GPU, to try out a smaller one",
    )  # fmt: skip


def grid(args: argparse.Namespace, world_size: int) -> tuple[int, int]:
    """Returns (number of stages, number of replicas of the pipeline) that the ranks form.

    Raises:
        UserError: --num_stages does not divide the number of ranks.
    """
    num_stages = args.num_stages or world_size
    if world_size % num_stages:
        raise UserError(f"--num_stages {num_stages} does not divide the {world_size} ranks")
    return num_stages, world_size // num_stages


def choose_stages(
    args: argparse.Namespace,
    info: ModelInfo,
    ds_config: dict,
    train: RowLoader,
    dtype: torch.dtype,
    resume: Any,
    log: RunLog,
) -> list[int]:
    """Splits the model into stages and decides on activation checkpointing, so that every stage fits. Collective.

    A resumed run keeps the split saved in the checkpoint, unless --partition or another number of stages changes it.

    Args:
        args: partition and activation_checkpointing, each None to decide here.
        ds_config: its `pipeline.activation_checkpoint_interval` is set to what was decided.
        train: the micro-batches.
        resume: `common.checkpoint.Resume` or None; marked for resharding if its split differs.

    Returns:
        num_stages + 1 bounds: stage s builds layers bounds[s] .. bounds[s + 1] - 1.

    Raises:
        UserError: --partition fits neither the model nor the number of stages.
    """
    num_stages, device = distributed.world_size() // train.dp_world_size, train.device
    config, micro_batches, context = info.config, train.gradient_accumulation_steps, train.rows.mean_context_len
    usable = min(numbers[0] for numbers in distributed.gather_numbers([memory.usable_gpu_bytes(device)], device))
    peak = functools.partial(
        memory.stage_peak, config, memory.layer_sizes(config), num_stages, dtype=dtype,
        dp_world_size=train.dp_world_size, micro_batches=micro_batches, rows=train.micro_batch_size,
        length=args.max_length,
    )  # fmt: skip
    saved = resume.state.get("bounds") if resume and resume.state else None
    num_layers = config.num_hidden_layers + 3
    keep = saved and args.partition is None and len(saved) == num_stages + 1 and saved[-1] == num_layers
    method = "balanced" if args.partition is None else args.partition
    interval = ds_config.setdefault("pipeline", {}).get("activation_checkpoint_interval", 0)
    checkpointing = args.activation_checkpointing
    if checkpointing is None and interval:
        checkpointing = True
    bounds, checkpointing = plan_stages(
        config, num_stages, method, context, peak, usable, saved if keep else None, checkpointing
    )
    ds_config["pipeline"]["activation_checkpoint_interval"] = (interval or 1) if checkpointing else 0
    if saved and saved != bounds and resume.has_optimizer and not resume.reshard:
        resume.reshard = True
        resume.summary += f", resharded: its stages begin at layers {saved[:-1]}, this run's at {bounds[:-1]}"
    log.info(*describe_partition(config, bounds, micro_batches, context))
    log.info(describe_memory(bounds, peak, usable, checkpointing))
    return bounds


def partition(config: PreTrainedConfig, num_stages: int, method: str, mean_context_len: float) -> list[int]:
    """Returns the stage bounds for `--partition`: "balanced", "uniform" or decoder layers per stage as in "11,5".

    Raises:
        UserError: more stages than decoder layers, or a list that does not fit stages or layers.
    """
    layers = config.num_hidden_layers
    if num_stages > layers:
        raise UserError(f"--num_stages {num_stages}: the model has {layers} decoder layers, fewer than stages")
    if method == "balanced":
        return balance(layer_costs(config, mean_context_len), num_stages)
    if method == "uniform":
        counts = [layers // num_stages + (stage < layers % num_stages) for stage in range(num_stages)]
    else:
        try:
            counts = [int(count) for count in method.split(",")]
            if min(counts) < 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--partition '{method}': expected balanced, uniform or decoder layers per stage such as 11,5"
            ) from None
        if len(counts) != num_stages or sum(counts) != layers:
            raise UserError(
                f"--partition {method} gives {sum(counts)} decoder layers to {len(counts)} stages; the model has "
                f"{layers} and --num_stages is {num_stages}"
            )
    # Stage 0 also gets the embedding, the last one the final norm and the head.
    return [0, *(1 + end for end in accumulate(counts[:-1])), layers + 3]


def plan_stages(
    config: PreTrainedConfig,
    num_stages: int,
    method: str,
    mean_context_len: float,
    peak: Callable[..., float],
    usable: float,
    bounds: list[int] | None = None,
    checkpointing: bool | None = None,
) -> tuple[list[int], bool]:
    """Decides what `--partition` and `--activation_checkpointing` leave open, so that every stage fits its GPU.

    Of the balanced splits that fit, with and without activation checkpointing, it takes the one whose slowest stage is
    fastest. If none fits, it allows for less fragmentation, and finally takes the split that ignores memory.

    Args:
        method: see `partition`; only "balanced" leaves the split open.
        peak: function of (stage, start, end, checkpointing), in bytes.
        usable: bytes of GPU memory per rank.
        bounds: of the run to resume; None to decide.
        checkpointing: True or False if a flag or the JSON says so; None to decide.

    Returns:
        (bounds, whether to use activation checkpointing).
    """
    choices = [False, True] if checkpointing is None else [checkpointing]
    if bounds is None and method == "balanced":
        for limit in (MAX_FILL * usable, usable, 1.1 * usable):
            plans = []
            for choice in choices:
                costs = layer_costs(config, mean_context_len, choice)
                split = balance(costs, num_stages, lambda *part, c=choice, limit=limit: peak(*part, c) <= limit)
                if split:
                    plans.append((max(sum(costs[start:end]) for start, end in pairwise(split)), choice, split))
            if plans:
                _, choice, bounds = min(plans)
                return bounds, choice
    bounds = bounds or partition(config, num_stages, method, mean_context_len)
    for choice in choices:
        if all(peak(stage, *part, choice) <= MAX_FILL * usable for stage, part in enumerate(pairwise(bounds))):
            return bounds, choice
    return bounds, choices[-1]


def describe_memory(bounds: list[int], peak: Callable[..., float], usable: float, checkpointing: bool) -> str:
    """Describes in one line the estimated memory per stage, and whether activation checkpointing is on."""
    line = f"activation checkpointing: {'on' if checkpointing else 'off'}"
    if usable == math.inf:
        return line
    peaks = [peak(stage, *part, checkpointing) / memory.GIB for stage, part in enumerate(pairwise(bounds))]
    needed = ", ".join(f"{gib:.1f}" for gib in peaks)
    return f"{line}; the stages need about {needed} GiB, each GPU has {usable / memory.GIB:.1f}"


def describe_partition(
    config: PreTrainedConfig, bounds: list[int], micro_batches: int, mean_context_len: float
) -> list[str]:
    """Describes each stage and its share of the work in a line, and the expected idle time in another.

    With M micro-batches and S stages of equal work, a stage waits (S - 1) / (M + S - 1) of a step (GPipe,
    section 2.3); stages of unequal work also wait for the slowest one.
    """
    costs = layer_costs(config, mean_context_len)
    work = [sum(costs[start:end]) for start, end in pairwise(bounds)]
    num_stages = len(work)
    lines = []
    for stage, (start, end) in enumerate(pairwise(bounds)):
        first, last = max(start, 1), min(end, config.num_hidden_layers + 1)
        parts = ["embedding"] if start == 0 else []
        if last > first:
            parts.append(f"{last - first} decoder layer{'s' * (last - first > 1)} ({first - 1}-{last - 2})")
        if end == len(costs):
            parts.append("norm and head")
        lines.append(f"stage {stage}: {' + '.join(parts)} | {work[stage] / sum(work):.1%} of the work")
    if num_stages == 1:
        return lines
    bubble = (num_stages - 1) / (micro_batches + num_stages - 1)
    idle = 1 - (1 - bubble) * sum(work) / (num_stages * max(work))
    lines.append(
        f"bubble: {num_stages - 1} / ({micro_batches} micro-batches + {num_stages - 1}) = {bubble:.1%}; "
        f"with the slowest stage's extra work {idle:.1%} idle on average"
    )
    return lines
