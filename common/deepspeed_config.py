"""The DeepSpeed JSON: read, checked, and overridden by flags before `deepspeed.initialize` sees it.

DeepSpeed silently ignores most unknown keys, and several of its keys have no effect in these scripts.
"""

import difflib
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from common.errors import UserError, one_line
from common.tracking import RunLog

if TYPE_CHECKING:
    from common.checkpoint import Resume

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
MOST_ROWS = 1_000_000  # per optimizer step; the batch itself would fill the memory

# Sections that DeepSpeed has a pydantic model of, which names the keys and checks the values.
MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
}
# The supported keys of each section; "" is the top level. DeepSpeed has no model of those written out here.
KEYS = {
    **{
        section: set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        for section, model in MODELS.items()
    },
    "checkpoint": {"tag_validation", "parallel_write"},
    "data_types": {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"},
    "flops_profiler": set(vars(DeepSpeedFlopsProfilerConfig({}))),
    "pipeline": {"activation_checkpoint_interval", "use_reentrant"},
    "timers": {"throughput"},
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
KEYS[""] = {
    *KEYS, *BATCH_KEYS, "communication_data_type", "disable_python_gc", "dump_state", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip

# Keys that have no effect here, or silently change what the loops do, and what to use instead.
REFUSED = {
    "optimizer": "the script builds AdamW: use --learning_rate and --weight_decay",
    "scheduler": "the script builds a cosine schedule: use --learning_rate and --warmup_steps",
    "activation_checkpointing": "use --activation_checkpointing of offload/train.py or pipeline/train.py, or "
    "pipeline.activation_checkpoint_interval in pipeline/'s JSON",
    "compile": "use --compile",
    "amp": "use --precision",
    "aio": "offload/train.py offloads to host memory, not to NVMe",
    "data_efficiency": "common/rows.py makes the batches: use --packing, --max_length and --batch_size",
    "dataloader_drop_last": "common/rows.py makes the batches: use --packing, --max_length and --batch_size",
    "tensor_parallel": "use pipeline/train.py to split a model over several GPUs",
    "elasticity": "use --resume_from_checkpoint, which can resume on a different number of GPUs",
    "gradient_allreduce_op": "the loops rely on the mean over the ranks",
    "checkpoint.load_universal": "use --resume_from_checkpoint",
    "checkpoint.checkpoint_serialization": "resuming needs the index that only PyTorch's zip format has",
    "checkpoint.writer": "a checkpoint is renamed when save_checkpoint returns, and has to be complete by then",
    "pipeline.stages": "use --num_stages",
    "pipeline.partition": "use --partition",
    "pipeline.seed_layers": "use --seed",
    "zero_optimization.cpu_offload": "use zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use zero_optimization.offload_param",
    "zero_optimization.zenflow": "it overrides gradient_accumulation_steps: use zero_optimization.offload_optimizer",
    "zero_optimization.offload_optimizer.super_offload": "it does not save Adam's moments",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    **{
        f"zero_optimization.{key}_weights_on_model_save": "convert a checkpoint with common.convert to-hf"
        for key in ("gather_16bit", "stage3_gather_16bit", "stage3_gather_fp16")
    },
}


def from_args(args: Namespace, technique: str, device: torch.device, log: RunLog) -> tuple[dict[str, Any], torch.dtype]:
    """Reads `--deepspeed_config`, checks it for a technique, and chooses the precision (see `set_precision`).

    Args:
        technique: "zero", "offload" or "pipeline".

    Returns:
        (the config, in which `zero_optimization.stage` is set; the dtype of the weights and of the computation).

    Raises:
        UserError: this script cannot use the JSON, or the hardware does not support the precision.
    """
    ds_config = load(args.deepspeed_config)
    ds_config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    check_technique(ds_config, technique)
    dtype, why = set_precision(ds_config, device, args.precision)
    log.info(why)
    return ds_config, dtype


def load(path: str | Path) -> dict[str, Any]:
    """Reads the JSON.

    Raises:
        UserError: the file is missing or not JSON, or contains an unknown key, a key in `REFUSED` (even one that turns
            its feature off) or an invalid value, or enables both fp16 and bf16.
    """
    path = Path(path)
    try:
        ds_config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} is not JSON: {error}") from error
    if not isinstance(ds_config, dict):
        raise UserError(f"--deepspeed_config {path} contains a {type(ds_config).__name__}, expected an object")
    values = dict(_flatten(ds_config))
    for key in values:
        if key in REFUSED:
            raise UserError(f"{path}: '{key}' is not supported: {REFUSED[key]}")
    for section, known in KEYS.items():
        content = ds_config.get(section, {}) if section else ds_config
        if not isinstance(content, dict):
            raise UserError(f"{path}: '{section}' is {content!r}, expected an object")
        for key in content:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise UserError(f"{path}: unsupported key '{section + '.' if section else ''}{key}'{hint}")
    for section, model in MODELS.items():
        try:
            model(**ds_config.get(section, {}))
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"{path}: DeepSpeed rejects '{section}': {one_line(error, 200)}") from error
    # Values that the models would convert, or that DeepSpeed checks late or never.
    for key in ("fp16.enabled", "bf16.enabled"):
        if not isinstance(values.get(key, False), bool):
            raise UserError(f"{path}: '{key}' is {values[key]!r}, expected true or false")
    if values.get("fp16.enabled") and values.get("bf16.enabled"):
        raise UserError(f"{path} enables both fp16 and bf16")
    for key, least in (("gradient_clipping", 0), ("steps_per_print", 1)):
        value = values.get(key, least)
        if type(value) not in (int, float) or not least <= value < float("inf"):
            raise UserError(f"{path}: '{key}' is {value!r}, expected a number >= {least}")
    interval = values.get("pipeline.activation_checkpoint_interval", 0)
    if type(interval) is not int or interval < 0:
        raise UserError(f"{path}: 'pipeline.activation_checkpoint_interval' is {interval!r}, expected an integer >= 0")
    return ds_config


def _flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all keys of nested dicts, such as `zero_optimization.stage`, with their values."""
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")


@contextmanager
def config_errors(path: str | Path) -> Iterator[None]:
    """Turns what DeepSpeed raises because of a value in the JSON into a UserError that names the file."""
    try:
        yield
    except (
        AssertionError, AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError,
        DeepSpeedConfigError, ZeRORuntimeException,
    ) as error:  # fmt: skip
        raise UserError(f"DeepSpeed rejects {path}: {one_line(error, 300)}") from error


def check_technique(ds_config: dict[str, Any], technique: str) -> None:
    """Raises UserError for settings that contradict each other or the script, which DeepSpeed would silently accept.

    Args:
        ds_config: as `load` returned it.
        technique: "zero", "offload" or "pipeline".
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    if technique == "pipeline" and stage != 1:
        raise UserError(
            f"zero_optimization.stage is {stage}, but a pipeline needs stage 1: it accumulates gradients over the "
            "micro-batches, so only optimizer states can be sharded"
        )
    devices = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    for key, device in devices.items():
        if device not in ("none", "cpu"):
            raise UserError(f"zero_optimization.{key}.device is {device!r}, but only 'cpu' is supported")
        if device == "cpu" and technique != "offload":
            raise UserError(
                f"zero_optimization.{key} is for offload/train.py; {technique}/train.py keeps weights and optimizer "
                "on the GPU"
            )
    if devices["offload_param"] == "cpu" and stage != 3:
        raise UserError(
            f"zero_optimization.offload_param contradicts stage {stage}: DeepSpeed would ignore it, because weights "
            "are only sharded, and can only be offloaded, under stage 3"
        )
    if technique == "offload" and devices["offload_optimizer"] != "cpu":
        raise UserError(
            "zero_optimization.offload_optimizer.device is not 'cpu', but offload/train.py keeps the optimizer there "
            "(DeepSpeedCPUAdam); without offload use zero/train.py"
        )
    if technique == "offload" and stage == 0:
        raise UserError("zero_optimization.offload_optimizer contradicts stage 0: it needs stage 1, 2 or 3")
    if technique == "pipeline" and ds_config.get("wall_clock_breakdown"):
        raise UserError("wall_clock_breakdown fails in DeepSpeed's pipeline engine: set it to false")
    if technique != "pipeline" and "pipeline" in ds_config:
        raise UserError("the config has a 'pipeline' section, which only pipeline/train.py reads")


def resolve_batch_size(
    ds_config: dict[str, Any],
    dp_world_size: int,
    micro_batch_size: int | None = None,
    accumulation_steps: int | None = None,
    resume: "Resume | None" = None,
) -> tuple[int, int, int]:
    """Puts the batch flags into the config and makes its three batch keys agree.

    A flag replaces its key. `train_batch_size` then determines the missing keys, as in DeepSpeed's
    `_set_batch_related_parameters`: if it is the only one, there is no accumulation.

    Args:
        resume: the checkpoint to resume from. Sizes that no flag sets are chosen to keep that run's global batch size,
            whatever the number of ranks.

    Returns:
        (micro_batch_size, accumulation_steps, global_batch_size), in rows; the last is the product of the first
        two and dp_world_size.

    Raises:
        UserError: a size is not a positive integer, or the JSON's train_batch_size is not the product.
    """
    sizes = {key: ds_config[key] for key in BATCH_KEYS if key in ds_config}
    flags = {BATCH_KEYS[0]: micro_batch_size, BATCH_KEYS[1]: accumulation_steps}
    sizes |= {key: flag for key, flag in flags.items() if flag}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{key} is {value!r}, expected a positive integer")
    micro, accumulation, total = (sizes.get(key) for key in BATCH_KEYS)
    resumed = resume.state["data"]["global_batch_size"] if resume and resume.state else None

    if resumed and accumulation_steps is None:
        rows_per_rank, rest = divmod(resumed, dp_world_size)
        if micro_batch_size is None and not rest:
            # The largest micro-batch that divides the rank's rows and is not larger than the JSON's.
            most = micro or max(1, (total or 0) // ((accumulation or 1) * dp_world_size))
            micro = max(size for size in range(1, min(most, rows_per_rank) + 1) if rows_per_rank % size == 0)
        if not rest and rows_per_rank % micro == 0:
            accumulation = rows_per_rank // micro
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
    equation = f"{micro} rows x {accumulation} accumulation steps x {dp_world_size} data-parallel ranks = {product}"
    if product > MOST_ROWS:
        raise UserError(f"{equation} rows per step, expected at most {MOST_ROWS}")
    if total not in (None, product):
        also = f"; the resumed run has {resumed}" if resumed else ""
        raise UserError(f"train_batch_size is {total}, but {equation}{also}")
    ds_config.update(zip(BATCH_KEYS, (micro, accumulation, product), strict=True))
    return micro, accumulation, product


def describe_batch(ds_config: dict[str, Any], max_length: int) -> str:
    """Returns the batch equation as a line, in rows and tokens."""
    micro, accumulation, rows = (ds_config[key] for key in BATCH_KEYS)
    return (
        f"batch: {micro} rows x {accumulation} micro-batches x {rows // (micro * accumulation)} data-parallel ranks = "
        f"{rows} rows of {max_length} = {rows * max_length:,} tokens"
    )


def precision_of(ds_config: dict[str, Any]) -> str:
    """Returns which of fp16, bf16 and fp32 the config enables."""
    return next((name for name in ("fp16", "bf16") if ds_config.get(name, {}).get("enabled")), "fp32")


def set_precision(
    ds_config: dict[str, Any], device: torch.device, flag: str | None = None, source: str = "the JSON"
) -> tuple[torch.dtype, str]:
    """Chooses the precision of the run and writes it into the config.

    Args:
        flag: --precision. Without it the config decides, and where the hardware lacks its precision, fp16 replaces
            bf16 on a GPU and fp32 replaces both on a CPU.
        source: what to call the config in the returned line.

    Returns:
        (the dtype; a line that says which precision was chosen and why).

    Raises:
        UserError: the hardware does not support the flag's precision.
    """
    on_cpu = device.type == "cpu"
    has_bf16 = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = flag or precision_of(ds_config)
    runs, why = wanted, "--precision" if flag else f"{source} says so"
    if flag == "fp16" and on_cpu:
        raise UserError("--precision fp16 needs a GPU, and there is none")
    if wanted == "bf16" and not has_bf16:
        gpu = torch.cuda.get_device_name(device)
        if flag:
            raise UserError(f"--precision bf16: {gpu} does not support bf16, only fp16 and fp32")
        runs, why = "fp16", f"{source} says bf16, but {gpu} does not support it"
    elif on_cpu and not flag and wanted != "fp32":
        runs, why = "fp32", f"{source} says {wanted}, but there is no GPU"
    for name in ("fp16", "bf16"):
        ds_config[name] = {**ds_config.get(name, {}), "enabled": name == runs}
    if runs != "bf16":
        # DeepSpeed can accumulate gradients in another dtype for bf16 weights only, not for fp16 or fp32 ones.
        ds_config.pop("data_types", None)
    return PRECISIONS[runs], f"precision: {runs} ({why})"
