"""The DeepSpeed JSON: read, checked, patched by flags, before `deepspeed.initialize` sees it.

DeepSpeed accepts unknown keys without a word, so a misspelt one would change nothing and say nothing.
"""

import difflib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from common.errors import UserError, one_line

KNOWN = {
    "": {
        "activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger", "communication_data_type",
        "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather",
        "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
        "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor", "log_level",
        "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
        "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard",
        "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
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
    "data_types": {"grad_accum_dtype"},
}  # fmt: skip
KNOWN["zero_optimization"] = set(DeepSpeedZeroConfig.model_fields) | {
    field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias
}

# More would fill the memory with the batch alone.
MOST_ROWS = 1_000_000

# Numbers that DeepSpeed reads late or not at all: (key, section, least value).
NUMBERS = (("gradient_clipping", "", 0), ("steps_per_print", "", 1), ("activation_checkpoint_interval", "pipeline", 0))

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(path):
    """The JSON as a dict.

    Raises:
        UserError: no such file, not JSON, an unknown key, fp16 and bf16 both on, or an optimizer or scheduler
            section (the scripts build theirs in Python, so the section would be ignored).
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
    for section, known in KNOWN.items():
        keys = ds_config.get(section, {}) if section else ds_config
        if not isinstance(keys, dict):
            raise UserError(f"{path}: '{section}' holds {keys!r}, not an object")
        for key in keys:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UserError(f"{path}: DeepSpeed has no key '{section + '.' if section else ''}{key}'{hint}")
    for key, section, least in NUMBERS:
        value = ds_config.get(section, {}).get(key, least) if section else ds_config.get(key, least)
        if type(value) not in (int, float) or not least <= value < float("inf"):
            raise UserError(f"{path}: '{key}' is {value!r}, not a number from {least} up")
    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValueError as error:
        raise UserError(f"{path}: DeepSpeed refuses 'zero_optimization': {one_line(error, 200)}") from error
    for key in ("optimizer", "scheduler"):
        if key in ds_config:
            raise UserError(
                f"{path} has a section '{key}', but the script builds its own (see --learning_rate and "
                "--warmup_steps): remove it"
            )
    if ds_config.get("fp16", {}).get("enabled") and ds_config.get("bf16", {}).get("enabled"):
        raise UserError(f"{path} turns on both fp16 and bf16")
    return ds_config


DEEPSPEED_ERRORS = (DeepSpeedConfigError, ZeRORuntimeException)


@contextmanager
def refusals(path):
    """Turns what DeepSpeed raises over a value in the JSON into a UserError that names the file."""
    try:
        yield
    except (AssertionError, ValueError, TypeError, KeyError, NotImplementedError, *DEEPSPEED_ERRORS) as error:
        raise UserError(f"DeepSpeed refuses {path}: {one_line(error, 300)}") from error


def check_pipeline(ds_config):
    """Raises UserError for what DeepSpeed's pipeline engine does not do, or does by an assertion on some ranks."""
    zero = ds_config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key):
            raise UserError(f"zero_optimization.{key}: the pipeline keeps its optimizer and weights on the GPU")
    stage = zero.get("stage", 0)
    if stage != 1:
        raise UserError(
            f"zero_optimization.stage is {stage!r}, the pipeline runs with 1: its stages accumulate gradients over "
            "micro-batches, so DeepSpeed shards optimizer states alone"
        )
    if ds_config.get("wall_clock_breakdown"):
        raise UserError("wall_clock_breakdown fails in DeepSpeed's pipeline engine: set it to false")


def check_zero(ds_config, *, offload):
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


def set_batch(ds_config, dp_world_size, micro_batch_size=None, accumulation_steps=None, resume=None):
    """Puts the batch flags into the config and makes its three batch keys agree.

    Args:
        resume: `common.checkpoint.Resume` or None. What no flag says is chosen so that the global batch is the resumed
            run's, whatever the number of ranks.

    Returns:
        (micro_batch_size, accumulation_steps, global_batch_size), in rows; the last is the product of the first
        two and dp_world_size.

    Raises:
        UserError: a size that is not a positive integer, or a train_batch_size in the JSON that is not the product.
    """
    micro = micro_batch_size or ds_config.get("train_micro_batch_size_per_gpu", 1)
    accumulation = accumulation_steps or ds_config.get("gradient_accumulation_steps", 1)
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if type(value) is not int or value < 1:
            raise UserError(f"{key} is {value!r}, not a positive integer")
    if resume and resume.run and accumulation_steps is None:
        rows_of_rank, rest = divmod(resume.run["data"]["global_batch_size"], dp_world_size)
        if micro_batch_size is None and not rest:
            micro = max(size for size in range(1, micro + 1) if rows_of_rank % size == 0)
        if not rest and rows_of_rank % micro == 0:
            accumulation = rows_of_rank // micro
    product = micro * accumulation * dp_world_size
    if product > MOST_ROWS:
        raise UserError(
            f"{micro} rows x {accumulation} x {dp_world_size} = {product:,} rows a step, more than {MOST_ROWS:,}"
        )
    given = ds_config.get("train_batch_size", product)
    if given != product:
        raise UserError(
            f"train_batch_size is {given!r}, but {micro} rows x {accumulation} accumulation steps x {dp_world_size} "
            f"data-parallel ranks = {product}"
        )
    ds_config["train_micro_batch_size_per_gpu"] = micro
    ds_config["gradient_accumulation_steps"] = accumulation
    ds_config["train_batch_size"] = product
    return micro, accumulation, product


def describe_batch(micro_batch_size, accumulation_steps, dp_world_size, max_length):
    """The batch equation as a line, in rows and tokens."""
    rows = micro_batch_size * accumulation_steps * dp_world_size
    return (
        f"batch: {micro_batch_size} rows x {accumulation_steps} micro-batches x {dp_world_size} data-parallel ranks = "
        f"{rows} rows of {max_length} = {rows * max_length:,} tokens"
    )


def precision_of(ds_config):
    """Which of fp16, bf16 and fp32 the config turns on."""
    return next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "fp32")


def set_precision(ds_config, device, flag=None, source="the JSON"):
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
