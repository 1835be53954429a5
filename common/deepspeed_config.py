"""The DeepSpeed JSON: read, checked and overridden by flags before `deepspeed.initialize` sees it.

DeepSpeed silently accepts unknown keys, so a misspelled one would have no effect.
"""

import difflib
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from common.errors import UserError, one_line
from common.tracking import RunLog

KNOWN = {
    "": {
        "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger", "communication_data_type",
        "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather",
        "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
        "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "log_level",
        "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
        "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard",
        "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb", "weight_quantization",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
    },
    "fp16": {
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
        "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads",
    },
    "bf16": {
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
    "pipeline": {
        "stages", "partition", "seed_layers", "activation_checkpoint_interval", "pipe_partitioned",
        "grad_partitioned", "use_reentrant",
    },
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
}  # fmt: skip
KNOWN["zero_optimization"] = set(DeepSpeedZeroConfig.model_fields) | {
    field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias
}

# Keys that have no effect here, or silently change what the loops do, with what to use instead (checked against the
# source of deepspeed 0.19.8).
_TO_HF = "has no effect here: convert a checkpoint with common.convert to-hf"
REFUSED = {
    **dict.fromkeys(
        ("optimizer", "scheduler"),
        "has no effect here: the script builds its own, see --learning_rate, --weight_decay and --warmup_steps",
    ),
    "activation_checkpointing": "has no effect here: use --activation_checkpointing of offload/train.py or "
    "pipeline/train.py, or pipeline.activation_checkpoint_interval in pipeline/'s JSON",
    "compile": "has no effect here: use --compile",
    "aio": "has no effect here: NVMe offload is not supported, offload/ uses the CPU's memory",
    "amp": "was removed from DeepSpeed: use --precision",
    **dict.fromkeys(
        ("data_efficiency", "curriculum_learning", "dataloader_drop_last"),
        "has no effect here: common/rows.py makes the batches, see --packing, --max_length and --batch_size",
    ),
    **dict.fromkeys(
        ("weight_quantization", "compression_training", "quantize_training", "eigenvalue"),
        "is not supported: nothing here quantizes weights",
    ),
    "tensor_parallel": "is not supported by any script here: pipeline/ splits a model over several GPUs",
    **dict.fromkeys(
        ("sequence_parallel_size", "data_parallel_size", "seq_parallel_communication_data_type"),
        "is for sequence parallelism, which no script here supports: pipeline/ splits a model over several GPUs",
    ),
    **dict.fromkeys(
        ("expert_parallel", "use_data_before_expert_parallelism"),
        "is for mixtures of experts, which no script here supports",
    ),
    "hybrid_engine": "is for RLHF, which no script here supports: use common.evaluate to generate text",
    "elasticity": "was removed from DeepSpeed: --resume_from_checkpoint continues a run on another number of GPUs",
    "autotuning": "is for the launcher's --autotuning, which these scripts do not support: try --batch_size and "
    "--accum_steps",
    **dict.fromkeys(
        ("progressive_layer_drop", "sparse_attention", "sparse_gradients", "graph_harvesting"),
        "was removed from DeepSpeed, and nothing here replaces it",
    ),
    **dict.fromkeys(
        ("nebula", "datastates_ckpt"), "is not supported: use --save_every, --keep_last and --resume_from_checkpoint"
    ),
    "checkpoint.load_universal": "is set by the script: use --resume_from_checkpoint",
    "checkpoint.use_node_local_storage": "is not supported: use an --output_dir that all hosts share",
    "disable_allgather": "has no effect in DeepSpeed either: remove it",
    "vocabulary_size": "has no effect here: the model's config.json has it",
    "gradient_allreduce_op": "is not supported: the loops rely on the mean over the ranks, DeepSpeed's default",
    "managed_gradient_accumulation": "is not supported: the engine counts the micro-batches, see --accum_steps",
    "pipeline.stages": "has no effect here: use --num_stages",
    "pipeline.partition": "has no effect here: use --partition",
    "pipeline.seed_layers": "has no effect here: use --seed",
    **dict.fromkeys(
        ("pipeline.pipe_partitioned", "pipeline.grad_partitioned"),
        "has no effect here: it is for tensor parallelism within a stage",
    ),
    "zero_optimization.zenflow": "overrides gradient_accumulation_steps: use offload_optimizer",
    "zero_optimization.offload_optimizer.super_offload": "does not save Adam's moments: remove it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "has no effect here: the optimizer is AdamW",
    "zero_optimization.gather_16bit_weights_on_model_save": _TO_HF,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _TO_HF,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _TO_HF,
}

# Further sections that have to be objects; their keys are left to DeepSpeed.
OBJECTS = (
    "checkpoint", "comet", "comms_logger", "csv_monitor", "flops_profiler", "tensorboard", "timers", "torch_autocast",
    "wandb",
)  # fmt: skip

# More would fill the memory with the batch alone.
MOST_ROWS = 1_000_000

# Numbers that DeepSpeed reads late or not at all: (key, section, least value).
NUMBERS = (("gradient_clipping", "", 0), ("steps_per_print", "", 1), ("activation_checkpoint_interval", "pipeline", 0))

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def from_args(args: Namespace, technique: str, device: torch.device, log: RunLog) -> tuple[dict[str, Any], torch.dtype]:
    """Reads `--deepspeed_config`, checks it for a technique, and decides the precision (see `set_precision`).

    Args:
        technique: "zero", "offload" or "pipeline".

    Returns:
        (the config, in which `zero_optimization.stage` is set; the dtype of the weights and of the computation).

    Raises:
        UserError: the JSON cannot be used by this script, or the hardware lacks the precision.
    """
    ds_config = load(args.deepspeed_config)
    ds_config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if technique == "pipeline":
        check_pipeline(ds_config)
    else:
        check_zero(ds_config, offload=technique == "offload")
    dtype, why = set_precision(ds_config, device, args.precision)
    log.info(why)
    return ds_config, dtype


def load(path: str | Path) -> dict[str, Any]:
    """The JSON as a dict.

    Raises:
        UserError: no such file, not JSON, an unknown key, a key in `REFUSED` (even one that switches its feature off),
            or fp16 and bf16 both on.
    """
    path = Path(path)
    try:
        ds_config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(ds_config, dict):
        raise UserError(f"--deepspeed_config {path} holds a {type(ds_config).__name__}, not an object")
    for key in _dotted_keys(ds_config):
        if key in REFUSED:
            raise UserError(f"{path}: '{key}' {REFUSED[key]}")
    for section, known in KNOWN.items():
        keys = ds_config.get(section, {}) if section else ds_config
        if not isinstance(keys, dict):
            raise UserError(f"{path}: '{section}' holds {keys!r}, not an object")
        for key in keys:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UserError(f"{path}: DeepSpeed has no key '{section + '.' if section else ''}{key}'{hint}")
    for key in OBJECTS:
        if not isinstance(ds_config.get(key, {}), dict):
            raise UserError(f"{path}: '{key}' holds {ds_config[key]!r}, not an object")
    for section in ("fp16", "bf16"):
        enabled = ds_config.get(section, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise UserError(f"{path}: '{section}.enabled' is {enabled!r}, not true or false")
    for key, section, least in NUMBERS:
        value = ds_config.get(section, {}).get(key, least) if section else ds_config.get(key, least)
        if type(value) not in (int, float) or not least <= value < float("inf"):
            raise UserError(f"{path}: '{key}' is {value!r}, not a number from {least} up")
    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValueError as error:
        raise UserError(f"{path}: DeepSpeed refuses 'zero_optimization': {one_line(error, 200)}") from error
    if ds_config.get("fp16", {}).get("enabled") and ds_config.get("bf16", {}).get("enabled"):
        raise UserError(f"{path} turns on both fp16 and bf16")
    return ds_config


def _dotted_keys(section, prefix=""):
    """All keys of nested dicts, as `zero_optimization.stage`."""
    for key, value in section.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")


DEEPSPEED_ERRORS = (DeepSpeedConfigError, ZeRORuntimeException)


@contextmanager
def config_errors(path: str | Path) -> Iterator[None]:
    """Turns what DeepSpeed raises because of a value in the JSON into a UserError that names the file."""
    try:
        yield
    except (
        AssertionError, AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError,
        *DEEPSPEED_ERRORS,
    ) as error:  # fmt: skip
        raise UserError(f"DeepSpeed refuses {path}: {one_line(error, 300)}") from error


def check_pipeline(ds_config: dict) -> None:
    """Raises UserError for what DeepSpeed's pipeline engine does not do, or does by an assertion on some ranks."""
    zero = ds_config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key):
            raise UserError(f"zero_optimization.{key}: the pipeline keeps its optimizer and weights on the GPU")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage != 1:
        raise UserError(
            f"zero_optimization.stage is {stage!r}, the pipeline runs with 1: its stages accumulate gradients over "
            "micro-batches, so DeepSpeed shards optimizer states alone"
        )
    interval = ds_config.get("pipeline", {}).get("activation_checkpoint_interval", 0)
    if type(interval) is not int:
        raise UserError(f"pipeline.activation_checkpoint_interval is {interval!r}, not a whole number of layers")
    if ds_config.get("wall_clock_breakdown"):
        raise UserError("wall_clock_breakdown fails in DeepSpeed's pipeline engine: set it to false")


def check_zero(ds_config: dict, *, offload: bool) -> int:
    """The ZeRO stage of a config for zero/ or offload/.

    Raises:
        UserError: a key that contradicts another or the script, which DeepSpeed would not mention.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"zero_optimization.stage is {stage!r}, not 0, 1, 2 or 3")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero:
            raise UserError(f"zero_optimization.{old} is DeepSpeed's old name for {new}: use that")
    devices = {}
    for key in ("offload_optimizer", "offload_param"):
        devices[key] = (zero.get(key) or {}).get("device", "none")
        if devices[key] not in ("none", "cpu"):
            raise UserError(f"zero_optimization.{key}.device is '{devices[key]}', this script offloads to 'cpu' alone")
    if "cpu" in devices.values() and not offload:
        raise UserError("the config offloads to the CPU, which offload/train.py does; zero/train.py trains on the GPU")
    if devices["offload_param"] == "cpu" and stage != 3:
        raise UserError(
            f"zero_optimization.offload_param contradicts stage {stage}: only stage 3 has weights cut up that could be "
            "offloaded, DeepSpeed would ignore it"
        )
    if offload and devices["offload_optimizer"] != "cpu":
        raise UserError(
            "zero_optimization.offload_optimizer.device is not 'cpu', but offload/train.py keeps the optimizer there "
            "(DeepSpeedCPUAdam); without offload use zero/train.py"
        )
    if offload and stage == 0:
        raise UserError("zero_optimization.offload_optimizer contradicts stage 0: offload begins with stage 1")
    if "pipeline" in ds_config:
        raise UserError("the config has a section 'pipeline', which pipeline/train.py alone reads")
    return stage


def resolve_batch_size(
    ds_config: dict,
    dp_world_size: int,
    micro_batch_size: int | None = None,
    accumulation_steps: int | None = None,
    resume: Any = None,
) -> tuple[int, int, int]:
    """Puts the batch flags into the config and makes its three batch keys agree.

    A flag replaces its key. `train_batch_size` then determines the keys that are missing, as in DeepSpeed's
    `_set_batch_related_parameters`: if it is the only one, there is no accumulation.

    Args:
        resume: `common.checkpoint.Resume` or None. What no flag sets is chosen so that the global batch is the resumed
            run's, whatever the number of ranks.

    Returns:
        (micro_batch_size, accumulation_steps, global_batch_size), in rows; the last is the product of the first
        two and dp_world_size.

    Raises:
        UserError: a size that is not a positive integer, or a train_batch_size in the JSON that is not the product.
    """
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    sizes = {key: ds_config[key] for key in keys if key in ds_config}
    sizes |= {key: flag for key, flag in zip(keys, (micro_batch_size, accumulation_steps), strict=False) if flag}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{key} is {value!r}, not a positive integer")
    micro, accumulation, total = (sizes.get(key) for key in keys)
    if resume and resume.state and accumulation_steps is None:
        rows_of_rank, rest = divmod(resume.state["data"]["global_batch_size"], dp_world_size)
        if micro_batch_size is None and not rest:
            most = micro or max(1, (total or 0) // ((accumulation or 1) * dp_world_size))
            micro = max(size for size in range(1, min(most, rows_of_rank) + 1) if rows_of_rank % size == 0)
        if not rest and rows_of_rank % micro == 0:
            accumulation = rows_of_rank // micro
    if total and not (micro and accumulation):
        known, what = (micro, "rows") if micro else (accumulation or 1, "accumulation steps")
        missing, rest = divmod(total, known * dp_world_size)
        if rest:
            raise UserError(
                f"train_batch_size is {total}, not a multiple of {known} {what} x {dp_world_size} data-parallel ranks "
                f"= {known * dp_world_size}"
            )
        micro, accumulation = (micro, missing) if micro else (missing, known)
    micro, accumulation = micro or 1, accumulation or 1
    product = micro * accumulation * dp_world_size
    if product > MOST_ROWS:
        raise UserError(
            f"{micro} rows x {accumulation} x {dp_world_size} = {product:,} rows a step, more than {MOST_ROWS:,}"
        )
    if total not in (None, product):
        resumed = (
            f"; the resumed run has {resume.state['data']['global_batch_size']}" if resume and resume.state else ""
        )
        raise UserError(
            f"train_batch_size is {total}, but {micro} rows x {accumulation} accumulation steps x {dp_world_size} "
            f"data-parallel ranks = {product}{resumed}"
        )
    ds_config.update(zip(keys, (micro, accumulation, product), strict=True))
    return micro, accumulation, product


def describe_batch(ds_config: dict, max_length: int) -> str:
    """The batch equation as a line, in rows and tokens."""
    micro = ds_config["train_micro_batch_size_per_gpu"]
    accumulation = ds_config["gradient_accumulation_steps"]
    rows = ds_config["train_batch_size"]
    return (
        f"batch: {micro} rows x {accumulation} micro-batches x {rows // (micro * accumulation)} data-parallel ranks = "
        f"{rows} rows of {max_length} = {rows * max_length:,} tokens"
    )


def precision_of(ds_config: dict) -> str:
    """Which of fp16, bf16 and fp32 the config turns on."""
    return next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "fp32")


def set_precision(
    ds_config: dict, device: torch.device, flag: str | None = None, source: str = "the JSON"
) -> tuple[torch.dtype, str]:
    """Decides what the run computes in and writes that into the config.

    Args:
        flag: --precision; without it the config's, or what the hardware has in its place.
        source: who says what the config says.

    Returns:
        (torch dtype, one line that says what runs and why).
    """
    wanted = precision_of(ds_config)
    runs, why = flag or wanted, "--precision" if flag else f"{source} says so"
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if flag is None and device.type == "cpu" and wanted != "fp32":
        runs, why = "fp32", f"{source} says {wanted}, but there is no GPU"
    elif flag is None and wanted == "bf16" and not has_bf16:
        runs, why = "fp16", f"{source} says bf16, but {torch.cuda.get_device_name(device)} has none"
    if runs == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU, and there is none")
    if runs == "bf16" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16, only fp16 and fp32")
    for name in ("fp16", "bf16"):
        ds_config[name] = {**ds_config.get(name, {}), "enabled": name == runs}
    if runs != "bf16":
        # Gradients of 16-bit weights may be summed in another type; those of fp32 and fp16 weights may not.
        ds_config.pop("data_types", None)
    return PRECISIONS[runs], f"precision: {runs} ({why})"
