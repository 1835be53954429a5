"""The checkpoints of zero/ and offload/: their float32 weights by name, for any ZeRO stage and number of ranks.

The optimizer updates float32 weights, the masters; a 16-bit run computes with rounded copies of them. Under ZeRO 1 to 3
each rank saves its shard of the masters in its own `..._optim_states.pt`, and DeepSpeed's converter merges the shards.
It gets files that were mapped into memory and found to ask for nothing but tensors and DeepSpeed's own classes; its own
way of reading them would execute whatever they ask for.
"""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, SINGLE_PARTITION_OF_FP32_GROUPS, ZERO_STAGE
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.tensor_fragment import fragment_address

from common.deepspeed_config import PRECISIONS
from common.errors import UserError, one_line
from common.shards import ZERO_FILES, load_tensors_only

DEEPSPEED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

# Under stage 3 DeepSpeed has a stand-in for each weight; `contiguous()` gathers it from the ranks' files.
Master: TypeAlias = torch.Tensor | zero_to_fp32.GatheredTensor


def read_masters(directory: Path) -> tuple[dict[str, Master], torch.dtype]:
    """The weights of a checkpoint that `engine.save_checkpoint` wrote for zero/train.py or offload/train.py.

    Under stages 1 and 2 DeepSpeed's converter holds all of them in memory, 4 bytes per parameter. Under stages 0 and 3
    they stay in the files.

    Returns:
        (the weights by their names in the HF model, the dtype that the run computed in). A tied weight is listed under
        each of its names.

    Raises:
        UserError: a file is missing, damaged, from another run, or a pickle that asks for more than tensors and
            DeepSpeed's classes.
    """
    states, layout, dtype = _model_states(directory)
    with torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed's progress
        try:
            masters = (_merge if layout["zero_stage"] else _stage_0)(directory, states, layout)
        except UserError:
            raise
        except Exception as error:  # the converter trusts its input, so it can fail anywhere
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{directory}: its files do not make up a checkpoint: {reason}") from error
    for name, master in masters.items():
        if not master.dtype.is_floating_point:
            raise UserError(f"{directory}: '{name}' is {master.dtype}, expected a floating-point type")
    return masters, dtype


def _model_states(directory: Path) -> tuple[list[dict], dict[str, Any], torch.dtype]:
    """Checks that the directory has the files of one run, all of them and no others.

    Returns:
        (the contents of the model_states files in rank order, the layout of their run, its torch dtype).
    """
    found = sorted(path.name for path in directory.glob(ZERO_FILES))
    whole, sharded = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    first = next((name for name in (whole, sharded.format(0)) if name in found), None)
    if first is None:
        raise UserError(f"{directory}: has {found[0]}, but neither {whole} nor {sharded.format(0)}")
    state = load_tensors_only(directory / first)
    try:
        layout, module = state["run"]["layout"], state["module"]
        stage, ranks, precision = layout["zero_stage"], layout["replicas"], layout["precision"]
        models = [sharded.format(rank) for rank in range(ranks)] if stage == 3 else [whole]
        expected = models + _optim_files(layout)
        dtype = PRECISIONS[precision]
    except Exception as error:  # the file may hold anything at all
        raise UserError(f"{directory / first}: not written by zero/train.py or offload/train.py") from error
    if not isinstance(module, dict):
        raise UserError(f"{directory / first}: from a pipeline, whose layer shards (layer_*) are missing")

    claim = f"{first} is from {ranks} ranks at ZeRO stage {stage} in {precision}, which write {len(expected)} files"
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            problem = "from another run" if name in found else "missing"
            raise UserError(f"{directory / name}: {problem}; {claim}, found {len(found)}")
    states = [state] + [load_tensors_only(directory / name) for name in models[1:]]
    for name, other in zip(models, states, strict=True):
        if not isinstance(other, dict) or other.get("run", {}).get("layout") != layout:
            raise UserError(f"{directory / name}: from another run; {claim}")
    return states, layout, dtype


def _optim_files(layout: dict[str, Any]) -> list[str]:
    """Names of the optim_states files in rank order."""
    prefix = "bf16_" if layout["precision"] == "bf16" else ""
    ranks = layout["replicas"] if layout["zero_stage"] else 0
    return [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]


def _merge(directory: Path, states: list[dict], layout: dict[str, Any]) -> dict[str, Master]:
    """The ranks' shards of the masters, merged by DeepSpeed."""
    stage, ranks = layout["zero_stage"], layout["replicas"]
    shards = []
    for name in _optim_files(layout):
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            optimizer = load_tensors_only(directory / name)["optimizer_state_dict"]
        count = optimizer["partition_count"]
        count = count if isinstance(count, int) else max(count)  # one per parameter group
        found = int(optimizer.get(ZERO_STAGE, stage)), count  # no stage if bf16 gradients are summed in float32
        if found != (stage, ranks):
            raise UserError(
                f"{directory / name}: from another run, sharded for stage {found[0]} and {found[1]} ranks; the "
                f"model_states next to it are from stage {stage} and {ranks} ranks"
            )
        shards.append(optimizer)
    models = [
        zero_to_fp32.zero_model_state(
            buffers={name: state["module"][name] for name in state["buffer_names"]},
            param_shapes=state["param_shapes"],
            shared_params=list(state["shared_params"].items()),
            ds_version=state["ds_version"],
            frozen_param_shapes=state["frozen_param_shapes"],
            frozen_param_fragments=state["frozen_param_fragments"],
        )
        for state in states
    ]
    # The functions behind get_fp32_state_dict_from_zero_checkpoint, which itself refuses checkpoints of stage 1 in bf16
    # with gradients summed in float32, because that optimizer does not save its stage.
    if stage == 3:
        groups = [shard[FP32_FLAT_GROUPS] for shard in shards]
        return zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(ranks, groups, models, False)
    groups = [shard[SINGLE_PARTITION_OF_FP32_GROUPS] for shard in shards]
    paddings = shards[0].get(zero_to_fp32.PARAM_ALIGNMENT_PADDINGS)
    return zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(ranks, groups, models, False, paddings)


def _stage_0(directory: Path, states: list[dict], layout: dict[str, Any]) -> dict[str, Master]:
    """The masters of a run without ZeRO.

    A 16-bit run saves them as a list without names, in the order of the model's parameters.
    """
    (state,) = states
    module = state["module"]
    if layout["precision"] == "fp32":
        return dict(module)
    names_of: dict[int, list[str]] = {}  # tied names share their memory
    for name, tensor in module.items():
        if name not in state["buffer_names"]:
            names_of.setdefault(tensor.data_ptr(), []).append(name)
    masters = [master for group in state["optimizer"]["fp32_groups"] for master in group]
    tensors = dict(module)
    for names, master in zip(names_of.values(), masters, strict=True):
        if not torch.equal(master.to(module[names[0]].dtype), module[names[0]]):
            raise UserError(f"{directory}: '{names[0]}' does not equal the optimizer's master in its place, rounded")
        tensors |= dict.fromkeys(names, master.detach())
    return tensors
